"""The models that engines are timed on.

The block model has four layers of the released model's shapes and random weights: 3.7 GB, written
once into out/. Its layers have a file of their own, which the chain model (chain_model.py) shares.
`four_layers` writes the same of another released size, as a text model: 4 to 8 GB.
"""

import json
import re
from collections.abc import Collection, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import save_file

from benchmarks.report import console
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.tensors import all_tensors

TINY = Path("examples/qwen3next-tiny")
RELEASED = Path("examples/configs")
TEXT_MODELS = {  # model_type → architecture
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}
Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name
LAYERS = "layers.safetensors"
LAYER = re.compile(r"model\.layers\.\d+|[^.]+")  # what a tensor's name begins with
OWN = ("model.embed_tokens.weight", "lm_head.weight", "mtp.fc.weight")  # not in that file

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 1e7,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
    },
    "attention_bias": False,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts": 64,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 5120,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def block_model(folder: Path) -> Path:
    """Write the block model, with its MTP head, into `folder` unless it is there."""
    if written(folder, CONFIG):
        return folder
    write_layers(folder / LAYERS, CONFIG)
    save_file(random_tensors(tensors(CONFIG), OWN), folder / "vocabulary.safetensors")
    finish(folder, CONFIG)
    return folder


def four_layers(folder: Path, size: str) -> Path:
    """Write a released size's text model, cut to four layers, into `folder` unless it is there.

    The vocabulary is cut by as much, so that the head keeps its share of a step. A file for each
    layer: the whole would take much of a small machine's memory.
    """
    released = read_config(RELEASED / size)["text_config"]
    layer_types = ["linear_attention"] * 3 + ["full_attention"]
    config = released | {
        "architectures": [TEXT_MODELS[released["model_type"]]],
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "vocab_size": released["vocab_size"] * len(layer_types) // released["num_hidden_layers"],
    }
    return by_layer(folder, config, tensors(config))


def by_layer(folder: Path, config: Mapping[str, Any], shapes: Shapes) -> Path:
    """Write a random model of these tensors, a file for each layer that is not there yet."""
    if finished(folder, config):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    by_file = {name: f"layers-{LAYER.match(name)[0]}.safetensors" for name in shapes}
    files = groupby(sorted(shapes, key=by_file.get), key=by_file.get)
    for seed, (file, names) in enumerate(files):
        if not (path := folder / file).exists():
            save_whole(random_tensors(shapes, list(names), seed), path)
    write_index(folder, by_file)
    finish(folder, config)
    return folder


def written(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a model with this config is complete in `folder`."""
    return (folder / LAYERS).exists() and finished(folder, config)


def finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the last file of a model with this config is there."""
    done = folder / "config.json"
    return done.exists() and json.loads(done.read_text()) == config


def save_whole(made: dict[str, torch.Tensor], path: Path) -> None:
    """Write a file, which is not there before it is complete."""
    part = path.with_suffix(".part")
    save_file(made, part)
    part.rename(path)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """Write the index of a model in several files, which transformers wants."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def finish(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the config, the last file of a model."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, in the released checkpoint's names."""
    parsed = Qwen3NextConfig.from_hf(config)
    return dict(sorted(all_tensors(parsed).items()))


def write_layers(path: Path, config: Mapping[str, Any]) -> None:
    """Write the random layers, trunk's and MTP's, unless they are there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    shapes = tensors(config)
    save_whole(random_tensors(shapes, [name for name in shapes if name not in OWN]), path)


def random_tensors(
    shapes: Shapes, names: Collection[str], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Tensors of these names, the same in each call."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _random(name, shapes[name], generator)
        for name in track(names, "writing a model", console=console)
    }


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values in the range of a trained model, so that routing and gates do real work."""
    if name.endswith("A_log"):
        return torch.empty(shape).uniform_(0, 2.5, generator=generator)
    if name.endswith("linear_attn.norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    std = 0.02 if len(shape) > 1 else 0.1
    return torch.randn(shape, generator=generator).mul_(std).to(torch.bfloat16)
