"""A released size with all its layers and random weights, as quantised releases are stored.

Projections and experts are quantised; embeddings, head, routers and the MTP layer are in bf16. The
text is known and four drafts in five are right, as in chain_model.py. It is written once, a file
for each layer: Qwen3.6-35B-A3B in 4 bits takes 20 GB.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from benchmarks.block_model import (
    LAYER,
    OWN,
    RELEASED,
    TEXT_MODELS,
    finish,
    finished,
    random_tensors,
    save_whole,
    tensors,
    write_index,
)
from benchmarks.chain_model import EMBEDDING, FC, made_fc, made_vocabulary, write_tokenizer
from benchmarks.report import console
from qwen3next_plugin.config import read_config

QUANTISED = re.compile(r"model\.layers\..*(_proj|in_proj_(qkv|z|qkvz))\.weight$")
STD = 0.02  # of weights
GROUP = 128
Parts = dict[str, Tensor]


class Kind(NamedTuple):
    """A way to store a weight: makes a random one [N, K], and what config.json says."""

    make: Callable[[int, int, torch.Generator], Parts]
    config: Mapping[str, Any]


def full_model(folder: Path, size: str, kind: str, layers: int | None = None) -> Path:
    """Write a size of examples/configs in one of KINDS into `folder` unless it is there.

    Args: layers: only the first of them.
    """
    config = full_config(size, kind, layers)
    if finished(folder, config):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensors(config)
    by_file: dict[str, list[str]] = {}
    for name in shapes:
        layer = LAYER.match(name)
        assert layer is not None
        by_file.setdefault("vocabulary" if name in OWN else layer[0], []).append(name)
    weight_map: dict[str, str] = {}
    parts = track(by_file.items(), "writing a model", console=console)
    for seed, (part, names) in enumerate(parts):
        if part == "vocabulary":
            made = made_vocabulary(config)
            made[FC] = made_fc(config, made[EMBEDDING][:64], rejected=False)
        else:
            made = layer_of({name: shapes[name] for name in names}, KINDS[kind], seed)
        file = folder / f"{part}.safetensors"
        save_whole(made, file)
        weight_map |= dict.fromkeys(made, file.name)
    write_index(folder, weight_map)
    write_tokenizer(folder, config["vocab_size"])
    finish(folder, config)
    return folder


def full_config(size: str, kind: str, layers: int | None = None) -> dict[str, Any]:
    """The config of a size's text model.

    `eos_token_id` is the last token, which no answer contains.
    """
    released = read_config(RELEASED / size)
    text = released.get("text_config", released)
    count = layers or text["num_hidden_layers"]
    config = text | {
        "architectures": [TEXT_MODELS.get(text["model_type"], "Qwen3NextForCausalLM")],
        "num_hidden_layers": count,
        "eos_token_id": text["vocab_size"] - 1,
    }
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:count]
    if quantization := KINDS[kind].config:
        config["quantization_config"] = dict(quantization)
    return config


def layer_of(shapes: Mapping[str, tuple[int, ...]], kind: Kind, seed: int) -> Parts:
    """The random tensors of a layer, those of projections and experts as a kind stores them."""
    plain = [name for name in shapes if not (kind.config and QUANTISED.match(name))]
    made = random_tensors(shapes, plain, seed)
    generator = torch.Generator().manual_seed(seed)
    for name in shapes.keys() - plain:
        module = name.removesuffix(".weight")
        parts = kind.make(*shapes[name], generator)
        made |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
    return made


def _bytes(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.uint8).random_(generator=generator)


def _nibbles(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Words of values of 4 bits, 8 on average: other means would add up over the columns.

    Shapes: shape in bytes, returns a quarter as many words
    """
    values = _bytes(shape, generator)
    values |= (values & 15 == 0).to(torch.uint8) << 3  # 8 in place of 0
    values |= (values < 16).to(torch.uint8) << 7
    return values.view(torch.int32)


def _scale(shape: tuple[int, ...], largest: float, generator: torch.Generator) -> Tensor:
    """Of values that are uniform from -largest to largest, so that weights have STD."""
    return torch.empty(shape).uniform_(0.8, 1.2, generator=generator) * STD * 3**0.5 / largest


def _packed(N: int, K: int, generator: torch.Generator) -> Parts:
    return {
        "weight_packed": _nibbles((N, K // 2), generator),
        "weight_scale": _scale((N, K // GROUP), 8, generator).bfloat16(),
        "weight_shape": torch.tensor([N, K]),
    }


def _gptq(N: int, K: int, generator: torch.Generator) -> Parts:
    return {
        "qweight": _nibbles((K // 8, 4 * N), generator),
        "qzeros": torch.full((K // GROUP, N // 8), 0x77777777, dtype=torch.int32),
        "scales": _scale((K // GROUP, N), 8, generator).half(),
        "g_idx": (torch.arange(K) // GROUP).int(),
    }


def _awq(N: int, K: int, generator: torch.Generator) -> Parts:
    return {
        "qweight": _nibbles((K, N // 2), generator),
        "qzeros": torch.full((K // GROUP, N // 8), -0x77777778, dtype=torch.int32),
        "scales": _scale((K // GROUP, N), 8, generator).half(),
    }


def _int8(N: int, K: int, generator: torch.Generator) -> Parts:
    values = _bytes((N, K), generator).view(torch.int8).clamp_(min=-127)
    return {"weight": values, "weight_scale": _scale((N, 1), 128, generator).bfloat16()}


def _fp8(N: int, K: int, generator: torch.Generator) -> Parts:
    values = torch.randn(N, K, generator=generator) * 64  # ±448 is seven times that
    blocks = (-(-N // 128), -(-K // 128))
    scale = torch.empty(blocks).uniform_(0.8, 1.2, generator=generator) * STD / 64
    return {"weight": values.to(torch.float8_e4m3fn), "weight_scale_inv": scale}


def _nvfp4(N: int, K: int, generator: torch.Generator) -> Parts:
    scale = torch.empty(N, K // 16).uniform_(0.8, 1.2, generator=generator) * 256
    return {
        "weight": _bytes((N, K // 2), generator),
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_scale_2": torch.tensor(STD / 256 / 2.93),  # the root of the mean square of e2m1
        "input_scale": torch.ones(()),
    }


def _compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:^mtp.*", "re:.*gate$", "re:.*in_proj_[ba]$"],
    }


_INTEGERS = {"type": "int", "symmetric": True}
_OF_TOOLS = {"bits": 4, "group_size": GROUP}
KINDS = {
    "int4": Kind(
        _packed,
        _compressed("pack-quantized", num_bits=4, strategy="group", group_size=GROUP, **_INTEGERS),
    ),
    "int8": Kind(_int8, _compressed("int-quantized", num_bits=8, strategy="channel", **_INTEGERS)),
    "fp8": Kind(
        _fp8,
        {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"},
    ),
    "gptq": Kind(_gptq, {"quant_method": "gptq", "desc_act": False, "sym": True, **_OF_TOOLS}),
    "awq": Kind(_awq, {"quant_method": "awq", "zero_point": True, "version": "gemm", **_OF_TOOLS}),
    "nvfp4": Kind(
        _nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": []}
    ),
    "bf16": Kind(lambda N, K, generator: {}, {}),
}
