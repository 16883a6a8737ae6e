"""LoRA adapters as PEFT saves them: what they add to each of our projections.

An adapter adds scale · B A to a checkpoint's weight. One projection of ours joins several of these
weights, in its own order of output channels, each with an adapter of its own rank. Its A stacks
theirs; its B has theirs side by side, with zeros elsewhere.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.config.errors import is_number, shown
from qwen3next_plugin.config.json_files import read_object
from qwen3next_plugin.model.checkpoint.headers import opened, read_header
from qwen3next_plugin.model.checkpoint.layouts import (
    FLAT_PROJECTION,
    Shapes,
    group_projections,
    holder,
    our_name,
)
from qwen3next_plugin.model.checkpoint.tensors import trunk_tensors

PEFT = "base_model.model."  # prefix of PEFT's names
LOW_RANK = re.compile(r"(.*)\.lora_(A|B)\.weight")
# The projections that take adapters; stacked ones in the order of their channels.
LINEAR = ("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
OTHERS = ("out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROJECTIONS = (*LINEAR, *OTHERS)
Pair = tuple[torch.Tensor, torch.Tensor]  # lora_A [r, K], lora_B [N, r]


class AdapterError(ValueError):
    """An adapter that cannot be served; names the tensor or setting, and the fix."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to a projection [N, K]: B A, scaled.

    Shapes: a [R, K], b [N, R], of the adapter's dtype
    """

    a: torch.Tensor
    b: torch.Tensor


def read(
    tensors: Iterable[tuple[str, torch.Tensor]],
    settings: Mapping[str, Any],
    config: Qwen3NextConfig,
) -> dict[str, LowRank]:
    """What an adapter adds to each of our projections, by the projection's name.

    Args:
        settings: of its adapter_config.json.

    Raises:
        AdapterError: a part of the adapter that would be ignored, or has another shape.
    """
    if pattern := settings.get("alpha_pattern"):
        raise AdapterError(
            f"adapter_config.json: alpha_pattern {pattern}: one lora_alpha is served for the "
            f"whole adapter; merge the adapter into the checkpoint"
        )
    if not is_number(alpha := settings.get("lora_alpha")):
        raise AdapterError(
            f"adapter_config.json: lora_alpha = {shown(alpha)}: must be a number; save the adapter "
            f"again"
        )
    shapes = _shapes(config)
    adapted = _pairs(tensors, shapes, config)
    found: dict[str, LowRank] = {}
    for ours, modules in _holders(shapes, config).items():
        if any(module in adapted for module in modules):
            parts = {module: adapted.get(module) for module in modules}
            found[ours] = _joined(parts, shapes, settings, config)
    return found


def check_stored(folder: Path, config: Qwen3NextConfig) -> None:
    """Refuse a folder's adapter by its file's header.

    Raises:
        AdapterError: as `read` and `stored`.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{path} is not there; name the folder that PEFT has saved")
    read(stored(folder, headers=True), read_object(path, AdapterError), config)


def stored(folder: Path, *, headers: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a folder's adapter; `headers`: without their data.

    Raises:
        AdapterError: there is no safetensors file, or a damaged one.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterError(
            f"{path} is not there, and other kinds of files are not read: loading them runs code; "
            f"save the adapter with PEFT's save_pretrained(..., safe_serialization=True)"
        )
    found = read_header(path, AdapterError)
    if headers:
        for name, header in found.items():
            yield name, torch.empty(header.shape, device="meta")
        return
    with opened(path, "pt", AdapterError) as file:
        for name in found:
            yield name, file.get_tensor(name)


def _shapes(config: Qwen3NextConfig) -> Shapes:
    """Every projection of the checkpoint that takes an adapter, and its shape [N, K]."""
    return {
        module: shape
        for name, shape in trunk_tensors(config).items()
        for module, _, parameter in [name.rpartition(".")]
        if parameter == "weight" and _kind(module) in PROJECTIONS and ".experts." not in module
    }


def _kind(module: str) -> str:
    return module.rpartition(".")[2]


def _holders(shapes: Shapes, config: Qwen3NextConfig) -> dict[str, list[str]]:
    """Our projections, with the checkpoint's projections in each."""
    found: dict[str, list[str]] = {}
    for module in sorted(shapes, key=lambda module: PROJECTIONS.index(_kind(module))):
        found.setdefault(holder(module, config), []).append(module)
    return found


def _pairs(
    tensors: Iterable[tuple[str, torch.Tensor]], shapes: Shapes, config: Qwen3NextConfig
) -> dict[str, Pair]:
    """A and B of each projection of the checkpoint that is adapted."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors:
        match = LOW_RANK.fullmatch(name.removeprefix(PEFT))
        module = our_name(match[1], config) if match else None
        if match is None or module is None or module not in shapes:
            taken = sorted({_kind(module) for module in shapes})
            raise AdapterError(
                f"tensor {name}: no adapter is served there; use one of this model that changes "
                f"{', '.join(taken)} only (of experts, the shared one)"
            )
        N, K = shapes[module]
        fits = tensor.dim() == 2 and (tensor.shape[1] == K if match[2] == "A" else len(tensor) == N)
        if not fits:
            raise AdapterError(
                f"tensor {name} has shape {tuple(tensor.shape)}, and the model's weight is "
                f"[{N}, {K}]; use an adapter of this model"
            )
        found.setdefault(module, {})[match[2]] = tensor
    if not found:
        raise AdapterError("the adapter has no tensors")
    return {module: _pair(module, halves) for module, halves in found.items()}


def _pair(module: str, halves: Mapping[str, torch.Tensor]) -> Pair:
    if len(halves) < 2 or not len(halves["A"]) == halves["B"].shape[1] > 0:
        sizes = ", ".join(f"lora_{name} {list(half.shape)}" for name, half in halves.items())
        raise AdapterError(
            f"{module}: lora_A [r, K] and lora_B [N, r] belong together, and the adapter has "
            f"{sizes}; save it again"
        )
    return halves["A"], halves["B"]


def _joined(
    parts: Mapping[str, Pair | None],
    shapes: Shapes,
    settings: Mapping[str, Any],
    config: Qwen3NextConfig,
) -> LowRank:
    """The adapter of one of our projections, joined from the checkpoint's projections in it."""
    a = torch.cat([pair[0] for pair in parts.values() if pair is not None])
    rows, start = [], 0
    for module, pair in parts.items():
        b = a.new_zeros(shapes[module][0], len(a))
        if pair is not None:
            rank = len(pair[0])
            b[:, start : start + rank] = pair[1] * _scale(settings, rank)
            start += rank
        rows.append((f"{module}.weight", b))
    if FLAT_PROJECTION.match(rows[0][0]):
        rows = list(group_projections(rows, config))
    return LowRank(a, torch.cat([b for _, b in rows]))


def _scale(settings: Mapping[str, Any], rank: int) -> float:
    """PEFT's lora_alpha / r, or with use_rslora lora_alpha / √r."""
    return settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
