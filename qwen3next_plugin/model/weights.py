"""The tensors of a checkpoint: names and shapes, and checks while they are read."""

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.model.formats import (
    EXPERT,
    PLAIN_DTYPES,
    Formats,
    plain_modules,
    read_formats,
)
from qwen3next_plugin.model.layouts import (
    FLAT_PROJECTION,
    MIXED,
    CheckpointError,
    Shapes,
    group_projections,
    in_projections,
    our_name,
    our_names,
    projections,
)
from qwen3next_plugin.model.mapped import give_back
from qwen3next_plugin.model.quantising import quantising

# Tensors that a quantised checkpoint may have in addition to a weight: its scales, zero points.
QUANTISATION_SUFFIXES = (
    *("_scale", "_scale_inv", "_scale_2", "scales", "qzeros", "g_idx", "qweight"),
    *("weight_packed", "weight_shape", "weight_zero_point"),
)

SCALES = (".weight_scale", "_weight_scale", ".weight_scale_inv", "_weight_scale_inv")

STORED_DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# A checkpoint's projection → the stacked projection that holds it, and as which part.
STACKED_PROJECTIONS: Mapping[str, tuple[str, str | int]] = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
    ".mlp.up_proj": (".mlp.gate_up_proj", 1),
    ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
    ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
}


def shard_rows(weight: torch.Tensor, parts: tuple[int, ...], rank: int, size: int) -> torch.Tensor:
    """One rank's share of a weight whose rows are `parts`, such as q, k and v, one after another.

    Shapes:
        weight [sum(parts), ...], returns [sum(parts)/size, ...]
    """
    return torch.cat([part.chunk(size)[rank] for part in weight.split(parts)])


def trunk_tensors(config: Qwen3NextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the trunk, in the released checkpoint's names."""
    D, vocab = config.hidden_size, config.vocab_size
    tensors = {"model.embed_tokens.weight": (vocab, D), "model.norm.weight": (D,)}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (vocab, D)
    for i, layer_type in enumerate(config.layer_types):
        layer = decoder_layer_tensors(config, layer_type, is_moe=config.is_moe_layer(i))
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer}
    return tensors


def decoder_layer_tensors(config: Qwen3NextConfig, layer_type: str, *, is_moe: bool) -> Shapes:
    """Name within the layer and shape of every tensor of one decoder layer."""
    mixer = _linear_attention if layer_type == "linear_attention" else _attention
    return mixer(config) | _mlp(config, is_moe) | _norms(config)


def _norms(config: Qwen3NextConfig) -> Shapes:
    names = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return {(name, (config.hidden_size,)) for name in names}


def _linear_attention(config: Qwen3NextConfig) -> Shapes:
    D, HV = config.hidden_size, config.linear_num_value_heads
    return in_projections(config) | {
        ("linear_attn.conv1d.weight", (config.conv_dim, 1, config.linear_conv_kernel_dim)),
        ("linear_attn.A_log", (HV,)),
        ("linear_attn.dt_bias", (HV,)),
        ("linear_attn.norm.weight", (config.linear_value_head_dim,)),
        ("linear_attn.out_proj.weight", (D, config.value_dim)),
    }


def _attention(config: Qwen3NextConfig) -> Shapes:
    D, head_dim = config.hidden_size, config.head_dim
    rows = {  # the query projection yields query and gate
        "q_proj": config.q_proj_size,
        "k_proj": config.kv_proj_size,
        "v_proj": config.kv_proj_size,
    }
    shapes: Shapes = {(f"self_attn.{name}.weight", (n, D)) for name, n in rows.items()}
    shapes.add(("self_attn.o_proj.weight", (D, config.attention_dim)))
    if config.attention_bias:
        shapes |= {(f"self_attn.{name}.bias", (n,)) for name, n in rows.items()}
        shapes.add(("self_attn.o_proj.bias", (D,)))
    return shapes | {(f"self_attn.{name}_norm.weight", (head_dim,)) for name in ("q", "k")}


def _mlp(config: Qwen3NextConfig, is_moe: bool) -> Shapes:
    D = config.hidden_size
    if not is_moe:
        return _swiglu("mlp.", D, config.intermediate_size)
    shapes: Shapes = {("mlp.gate.weight", (config.num_experts, D))}
    for i in range(config.num_experts):
        shapes |= _swiglu(f"mlp.experts.{i}.", D, config.moe_intermediate_size)
    if config.shared_expert_intermediate_size:
        shapes |= _swiglu("mlp.shared_expert.", D, config.shared_expert_intermediate_size)
        shapes.add(("mlp.shared_expert_gate.weight", (1, D)))
    return shapes


def _swiglu(prefix: str, D: int, intermediate: int) -> Shapes:
    return {
        (f"{prefix}gate_proj.weight", (intermediate, D)),
        (f"{prefix}up_proj.weight", (intermediate, D)),
        (f"{prefix}down_proj.weight", (D, intermediate)),
    }


def parameters(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: Qwen3NextConfig,
    *,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    quantised: bool = False,
    formats: Formats | None = None,
    layout: Layout = "grouped",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors by the names and in the order of rows of our parameters.

    A flat checkpoint is converted here, once, unless `layout`, of our parameters, is flat too.

    Args:
        quantised: a host's kernels take the tensors as the checkpoint has them.
        formats: ours take them, by rows.

    Raises:
        CheckpointError: as `checked`, or a quantised tensor that cannot be converted.
    """
    named = our_names(weights, config)
    if formats is not None:
        named, expected = formats.rows(named, ignored), formats.expected(expected)
        quantised = False  # any more
    tensors = checked(named, expected=expected, ignored=ignored, quantised=quantised)
    return group_projections(tensors, config) if layout == "grouped" else tensors


def formats_of(
    folder: Path,
    config: Qwen3NextConfig,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Mapping[str, Any] | None,
    *,
    asked: str | None,
) -> Formats:
    """The formats of a checkpoint's modules.

    Args:
        shapes: of its weights.
        quantization: quantization_config of its config.json.
        asked: by QWEN3NEXT_QUANTISE.

    Raises:
        CheckpointError: names a module that cannot be served as it is quantised, and the fix.
    """
    of_ours = functools.partial(holder, config=config)
    if asked is None:
        stored = list(stored_tensors(folder))
        found = read_formats(our_names(stored, config), shapes, of_ours, quantization)
        found.tower = next(
            (
                name
                for name, t in stored
                if t.dtype not in PLAIN_DTYPES and not our_name(name, config)
            ),
            None,
        )
        return found
    if quantization is not None:
        raise CheckpointError(
            f"QWEN3NEXT_QUANTISE={asked}: the checkpoint is quantised already, by its "
            f"quantization_config; unset the variable"
        )
    return quantising(asked, shapes, of_ours)


def plain_modules_of(
    folder: Path, config: Qwen3NextConfig, shapes: Mapping[str, tuple[int, ...]]
) -> frozenset[str]:
    """Our modules that a checkpoint's files have unquantised; raises as `plain_modules`."""
    of_ours = functools.partial(holder, config=config)
    return plain_modules(our_names(stored_tensors(folder), config), shapes, of_ours)


def holder(module: str, config: Qwen3NextConfig) -> str:
    """The name of our module that holds a module of the checkpoint."""
    if expert := EXPERT.match(module):
        return expert[1]
    if flat := FLAT_PROJECTION.match(f"{module}.weight"):
        whole = next(whole for whole, parts in projections(config).items() if flat[2] in parts)
        return f"{flat[1]}_{whole}"
    for part, (whole, _) in STACKED_PROJECTIONS.items():
        if module.endswith(part):
            return module.removesuffix(part) + whole
    return module


def checked(
    weights: Iterable[tuple[str, torch.Tensor]],
    *,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    quantised: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the expected tensors; refuse one that is unexpected, misshapen or missing.

    Args:
        weights: the tensors that the host reads from the checkpoint.
        expected: name to shape of every tensor that must be there.
        ignored: names that may be there and are skipped: the other model's part of the checkpoint.
        quantised: check names only, because packed tensors have other shapes, and allow scales.

    Raises:
        CheckpointError: naming the tensor, and what to do.
    """
    ignored, seen = frozenset(ignored), set()
    for name, tensor in weights:
        companion = quantised and name.endswith(QUANTISATION_SUFFIXES)
        weight = name.rsplit(".", 1)[0] + ".weight" if companion else name
        if weight in ignored:
            continue
        if weight not in expected:
            raise CheckpointError(
                f"unexpected tensor {name} {tuple(tensor.shape)}: the config has no place for it; "
                f"{MIXED}"
            )
        if not quantised and tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{expected[name]}: {MIXED}"
            )
        seen.add(weight)
        yield name, tensor
        give_back(tensor)
    if missing := sorted(expected.keys() - seen):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, the first is {missing[0]}: the checkpoint is "
            f"incomplete; download it again, or check model.safetensors.index.json"
        )


def check_scales(parameters: Iterable[str], loaded: Iterable[str]) -> None:
    """Refuse unquantised weights in a layer that is built for quantised ones.

    Raises:
        CheckpointError: naming a missing scale, and what to do.
    """
    scales = {name for name in parameters if name.endswith(SCALES)}
    if missing := sorted(scales.difference(loaded)):
        raise CheckpointError(
            f"{len(missing)} scales are missing, the first is {missing[0]}: the checkpoint has "
            f"these layers unquantised; name them in modules_to_not_convert of the config's "
            f"quantization_config"
        )


def check_files(folder: Path) -> None:
    """Refuse a folder with a cut-short safetensors file before anything is allocated.

    Raises:
        CheckpointError: naming the file, its size and the size its header promises.
    """
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        promised = _promised_size(path, size)
        if promised != size:
            raise CheckpointError(
                f"{path.name} has {size} bytes and its header promises {promised}: the file is "
                f"truncated or damaged; download it again"
            )


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, by name, without its data."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # other files may hold the same tensors again, under other names
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path for path in files if path.name in listed]
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it iterates no other way)
                header = file.get_slice(name)
                dtype = STORED_DTYPES.get(header.get_dtype(), torch.float32)
                yield name, torch.empty(header.get_shape(), dtype=dtype, device="meta")


def _promised_size(path: Path, size: int) -> int | str:
    """The length a safetensors file should have: 8 bytes, the header, the last tensor's end."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"a header of {header_size} bytes"
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            return "no readable header"
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    return 8 + header_size + max(ends, default=0)
