"""Quantised checkpoints in every layout that is served, and their dequantised twins."""

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import write_checkpoint
from needs import need
from qwen3next_plugin.config import read_config
from qwen3next_plugin.model.checkpoint.sizes import served_dtype
from qwen3next_plugin.model.quantisation import at_load
from qwen3next_plugin.model.quantisation.format import Format, dequantise

# Quantised as the released checkpoints are: neither what is looked up, nor routers, nor the head.
QUANTISED = re.compile(r".*(_proj|in_proj_\w+|\.fc)\.weight$")
# Served in int8 if the rest is quantised: the output head and stream mixers.
ROUNDED = re.compile(r"lm_head\.weight|.*\.input_mix_weight_(down|up)\.weight$")
# What of a module's name differs among those that an engine stacks.
STACKED = re.compile(r"(\.\d+)?\.(gate|up)_proj$|\.\d+(?=\.down_proj$)|[qkv]_proj$|(qkv|[zba])$")
# By QWEN3NEXT_QUANTISE.
KEPT_AT_LOAD = re.compile(r"(in_proj_(ba|b|a)|\.fc|\.ple\.\w+|\.index_qk_proj)\.weight$")
INT8_AT_LOAD = re.compile(r"\.self_attn\.")  # also by QWEN3NEXT_QUANTISE=int4
MIXED = "mixed"
AT_LOAD = ("int8", "int4")
E4M3, LARGEST = torch.float8_e4m3fn, 448.0
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # by nibble
Quantised = tuple[dict[str, Tensor], Tensor]  # a module's tensors, and the weight that they say


class Kind(NamedTuple):
    """A way to quantise: of a weight, and what config.json says of it."""

    quantise: Callable[[Tensor], Quantised]
    config: Mapping[str, Any]
    kv_scales: bool = False  # there are some of an FP8 KV cache


def write_partly_quantised(folder: Path) -> Path:
    """FP8, but for the MTP layer and a projection, of which config.json says nothing."""
    plain = write_checkpoint(folder / "plain")
    return write_quantised(plain, folder, "fp8-blocks", leave_out=r"^mtp|layers\.0.*qkvz")[0]


def quantise(
    plain: Path, folder: Path, kind: str, *, leave_out: str = "^$"
) -> tuple[Path, dict[str, str], Path]:
    """What to serve for a checkpoint in one of KINDS, MIXED or AT_LOAD, and its dequantised twin.

    Returns the folder, the environment and the twin's folder.
    """
    if kind in AT_LOAD:
        return plain, {"QWEN3NEXT_QUANTISE": kind}, write_rounded(plain, folder, kind)
    quantised, twin = write_quantised(plain, folder, kind, leave_out=leave_out)
    round_plain(twin)
    return quantised, {}, twin


def pack_checkpoint(folder: Path, out: Path, asked: str | None = None) -> Path:
    """Pack a checkpoint as `qwen3next pack` does; returns the folder that is written."""
    need("pack")
    from qwen3next_plugin.extras.pack.writing import plan_packing, write_packed

    dtype = getattr(torch, served_dtype(read_config(folder)))
    write_packed(plan_packing(folder, asked, dtype), out)
    return out


def write_quantised(
    plain: Path, folder: Path, kind: str, *, leave_out: str = "^$"
) -> tuple[Path, Path]:
    """Quantise a checkpoint, but for modules that match; returns its folder and the twin's.

    In the kind `mixed` modules differ, those alike that an engine stacks.
    """
    quantised, twin = folder / "quantised", folder / "twin"
    for each in (quantised, twin):
        shutil.copytree(plain, each)
    tensors, saved, plainly = load_file(plain / "model.safetensors"), {}, {}
    kinds = cycle(MIX)
    mix = defaultdict[str, str](lambda: next(kinds))
    for name, tensor in tensors.items():
        if QUANTISED.match(name) and tensor.ndim == 2 and not re.search(leave_out, name):
            module = name.removesuffix(".weight")
            own = mix[STACKED.sub("", module)] if kind == MIXED else kind
            parts, plainly[name] = KINDS[own].quantise(tensor.float())
            if KINDS[own].kv_scales and (kept := re.search(r"self_attn\.([kv])_proj$", module)):
                parts[f"{kept[1]}_scale"] = torch.full((), 0.7)
            saved |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        else:
            saved[name] = plainly[name] = tensor
    save_file(saved, quantised / "model.safetensors")
    save_file({n: t.contiguous() for n, t in plainly.items()}, twin / "model.safetensors")
    path = quantised / "config.json"
    config = KINDS[MIX[0] if kind == MIXED else kind].config
    raw = json.loads(path.read_text()) | {"quantization_config": dict(config)}
    path.write_text(json.dumps(raw))
    return quantised, twin


def write_rounded(plain: Path, folder: Path, name: str) -> Path:
    """The twin of a checkpoint that QWEN3NEXT_QUANTISE quantises, to `int8` or `int4`."""
    twin = shutil.copytree(plain, folder / name)
    tensors = load_file(plain / "model.safetensors")
    for each, tensor in tensors.items():
        if ROUNDED.match(each):
            tensors[each] = int8_by_row(tensor.float())[1]
        elif QUANTISED.match(each) and tensor.ndim == 2 and not KEPT_AT_LOAD.search(each):
            weight = tensor.float()
            in_int8 = name == "int8" or INT8_AT_LOAD.search(each)
            tensors[each] = int8_by_row(weight)[1] if in_int8 else int4_by_group(weight)
    save_file(tensors, twin / "model.safetensors")
    return twin


def round_plain(folder: Path) -> None:
    """Round to int8 what a quantised checkpoint has plain, and is served in int8."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in filter(ROUNDED.match, tensors):
        tensors[name] = int8_by_row(tensors[name].float())[1]
    save_file(tensors, file)


def round_to_int8(folder: Path) -> None:
    """Round a checkpoint's weights so that QWEN3NEXT_QUANTISE=int8 changes none of them."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if (QUANTISED.match(name) or ROUNDED.match(name)) and tensor.ndim == 2:
            tensors[name] = int8_by_row(tensor.float())[1].to(tensor.dtype)
    save_file(tensors, file)


def in_blocks(scale_dtype: torch.dtype, name: str = "weight_scale_inv") -> Callable:
    """FP8 with a scale of each 128 by 128."""

    def quantise(weight: Tensor) -> Quantised:
        N, K = weight.shape
        padded = weight.new_zeros(-(-N // 128) * 128, -(-K // 128) * 128)
        padded[:N, :K] = weight
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))  # [n, 128, k, 128]
        scale = (blocks.abs().amax(dim=(1, 3)) / LARGEST).clamp(min=1e-8).to(scale_dtype)
        by_weight = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:N, :K]
        values = (weight / by_weight).to(E4M3)
        return {"weight": values, name: scale}, values.float() * by_weight

    return quantise


def fp8_by_row(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST
    values = (weight / scale).to(E4M3)
    return {"weight": values, "weight_scale": scale.bfloat16()}, values.float() * scale.bfloat16()


def fp8_whole(weight: Tensor) -> Quantised:
    scale = weight.abs().amax().reshape(1) / LARGEST
    values = (weight / scale).to(E4M3)
    found = {"weight": values, "weight_scale": scale, "input_scale": torch.ones(1)}
    return found, values.float() * scale


def int8_by_row(weight: Tensor) -> Quantised:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    values = (weight / scale).round().to(torch.int8)
    return {"weight": values, "weight_scale": scale}, values.float() * scale


def int4_by_group(weight: Tensor) -> Tensor:
    """As QWEN3NEXT_QUANTISE=int4 rounds it; tests/model/test_rounding.py says how well."""
    K = weight.shape[1]
    form = Format("int4", next(g for g in (128, 64, 32) if K % g == 0), torch.bfloat16)
    return dequantise(at_load.quantise(weight, form), form)


class Grouped(NamedTuple):
    """A weight in integers: unsigned values [N, K], scales and zero points [N, G]."""

    values: Tensor
    scale: Tensor
    zero: Tensor
    weight: Tensor  # [N, K], dequantised


def in_groups(weight: Tensor, bits: int, group: int, *, zeros: bool) -> Grouped:
    """Round to nearest; the group is the row if it is 0."""
    grouped = weight.unflatten(1, (-1, group or weight.shape[1]))  # [N, G, group]
    top = (1 << bits) - 1
    if zeros:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).clamp(min=1e-4).half()
        zero = (-low / scale.float()).round().clamp(0, top)
    else:
        scale = (grouped.abs().amax(-1) / (top // 2)).clamp(min=1e-4).half()
        zero = torch.full_like(scale, 1 << bits - 1).float()
    values = (grouped / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    plain = (values - zero[..., None]) * scale.float()[..., None]
    return Grouped(values.flatten(1).int(), scale, zero.int(), plain.flatten(1))


def words(values: Tensor, bits: int) -> Tensor:
    """Values [R, C] in words [R, C·bits/32], the first lowest."""
    shifted = values.long().unflatten(1, (-1, 32 // bits)) << torch.arange(0, 32, bits)
    return shifted.sum(-1).to(torch.uint32).view(torch.int32)


def gptq(bits: int, group: int, *, zeros: bool, less: int = 1) -> Callable:
    def quantise(weight: Tensor) -> Quantised:
        found = in_groups(weight, bits, group, zeros=zeros)
        K = weight.shape[1]
        parts = {
            "qweight": words(found.values, bits).T,
            "qzeros": words((found.zero.T - less) % (1 << bits), bits),
            "scales": found.scale.T,
            "g_idx": (torch.arange(K) // (group or K)).int(),
        }
        return parts, found.weight

    return quantise


def awq(group: int) -> Callable:
    def quantise(weight: Tensor) -> Quantised:
        found = in_groups(weight, 4, group, zeros=True)
        order = [8 * i + j for i in range(len(weight) // 8) for j in AWQ_COLUMNS]
        parts = {
            "qweight": words(found.values.T[:, order], 4),
            "qzeros": words(found.zero.T[:, order], 4),
            "scales": found.scale.T,
        }
        return parts, found.weight

    return quantise


def packed(bits: int, group: int, *, zeros: bool = False) -> Callable:
    """By compressed-tensors' own packing."""

    def quantise(weight: Tensor) -> Quantised:
        found = in_groups(weight, bits, group, zeros=zeros)
        half = 1 << bits - 1
        parts = {
            "weight_packed": pack_to_int32((found.values - half).to(torch.int8), bits),
            "weight_scale": found.scale.bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if zeros:
            zero = (found.zero - half).to(torch.int8)
            parts["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
        by_weight = found.scale.bfloat16().float().repeat_interleave(group or weight.shape[1], 1)
        zero = found.zero.repeat_interleave(group or weight.shape[1], 1)
        return parts, (found.values - zero) * by_weight

    return quantise


def nvfp4(*, divides: bool) -> Callable:
    """By compressed-tensors' own packing; names and the module's scale are its own, or modelopt's.

    Scales reach down to the smallest of e4m3.
    """

    def quantise(weight: Tensor) -> Quantised:
        whole = weight.abs().amax() / (6 * LARGEST)
        divisor = (1 / whole).reshape(1)
        whole = 1 / divisor if divides else whole
        scale = weight.unflatten(1, (-1, 16)).abs().amax(-1) / (6 * whole)
        scale[:, -1] /= LARGEST
        scale = scale.clamp(min=2**-9).to(E4M3)
        values, plain = e2m1(weight, scale.float() * whole)
        if divides:
            more = {"weight_global_scale": divisor, "input_global_scale": torch.ones(1)}
            return {"weight_packed": values, "weight_scale": scale} | more, plain
        more = {"weight_scale_2": whole, "input_scale": torch.tensor(0.01)}
        return {"weight": values, "weight_scale": scale} | more, plain

    return quantise


def mxfp4(values_name: str) -> Callable:
    """Powers of two by which the largest of a group is at most 6."""

    def quantise(weight: Tensor) -> Quantised:
        largest = weight.unflatten(1, (-1, 32)).abs().amax(-1)
        exponent = (largest / 6).log2().ceil().clamp(min=-126)
        values, plain = e2m1(weight, exponent.exp2())
        return {values_name: values, "weight_scale": (exponent + 127).to(torch.uint8)}, plain

    return quantise


def e2m1(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two values a byte, and what they say. Shapes: weight [N, K], scale [N, groups]"""
    by_weight = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    values = pack_fp4_to_uint8(weight / by_weight)
    return values, unpack_fp4_from_uint8(values, *weight.shape, dtype=torch.float32) * by_weight


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """A config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT4 = {"num_bits": 4, "type": "float", "symmetric": True}
MODELOPT = {
    "quant_method": "modelopt",
    "quant_algo": "NVFP4",
    "group_size": 16,
    "ignore": ["lm_head", "mtp*"],
    "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
    "producer": {"name": "modelopt", "version": "0.37.0"},
}
OF_QUARK = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
QUARK = {
    "quant_method": "quark",
    "global_quant_config": {
        "weight": OF_QUARK | {"is_dynamic": False},
        "input_tensors": OF_QUARK | {"is_dynamic": True},
    },
    "exclude": ["lm_head"],
    "export": {"kv_cache_group": [], "weight_format": "real_quantized"},
}
KINDS: Mapping[str, Kind] = {
    "fp8-blocks": Kind(in_blocks(torch.float32), FP8),
    "fp8-blocks_bf16-scales": Kind(in_blocks(torch.bfloat16), FP8),
    "fp8-blocks_compressed": Kind(
        in_blocks(torch.float32, "weight_scale"),
        compressed("float-quantized", **FLOAT8, strategy="block", block_structure=[128, 128]),
    ),
    "fp8-rows": Kind(fp8_by_row, compressed("float-quantized", **FLOAT8, strategy="channel")),
    "fp8-whole": Kind(fp8_whole, compressed("float-quantized", **FLOAT8, strategy="tensor")),
    "int8-rows": Kind(int8_by_row, compressed("int-quantized", **INT8)),
    "gptq": Kind(gptq(4, 32, zeros=False), GPTQ),
    "gptq_zeros": Kind(gptq(4, 32, zeros=True), GPTQ | {"sym": False}),
    "gptq_v2": Kind(gptq(4, 32, zeros=True, less=0), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq_8-bit": Kind(gptq(8, 0, zeros=False), GPTQ | {"bits": 8, "group_size": -1}),
    "awq": Kind(awq(32), AWQ),
    "packed_4-bit": Kind(packed(4, 32), compressed("pack-quantized", **INT4)),
    "packed_4-bit_zeros": Kind(
        packed(4, 32, zeros=True), compressed("pack-quantized", **INT4 | {"symmetric": False})
    ),
    "packed_8-bit": Kind(packed(8, 0), compressed("pack-quantized", **INT8)),
    "packed_8-bit_groups": Kind(
        packed(8, 32), compressed("pack-quantized", **INT4 | {"num_bits": 8})
    ),
    "nvfp4": Kind(nvfp4(divides=False), MODELOPT, kv_scales=True),
    "nvfp4_compressed": Kind(
        nvfp4(divides=True),
        compressed("nvfp4-pack-quantized", **FLOAT4, strategy="tensor_group", group_size=16),
    ),
    "mxfp4": Kind(mxfp4("weight"), QUARK),
    "mxfp4_compressed": Kind(
        mxfp4("weight_packed"),
        compressed("mxfp4-pack-quantized", **FLOAT4, strategy="group", group_size=32),
    ),
}
# One kind of each method that a config.json names.
TWO_LAYERS = {"hidden_size": 160, "num_hidden_layers": 2, "full_attention_interval": 2}
TWO_LAYERS |= {"moe_intermediate_size": 64}
METHODS = ("fp8-blocks", "gptq", "awq", "packed_4-bit", "nvfp4", "mxfp4")
# Those that one config.json allows beside one another.
MIX = [kind for kind in KINDS if kind != "gptq_v2"]
