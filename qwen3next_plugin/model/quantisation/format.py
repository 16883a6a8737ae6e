"""How a weight is stored: by a checkpoint, and in our parameters, in one form for all schemes.

Every tensor of a module has the module's output channels as its first dimension, so stacking,
sharding and regrouping move all of them alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import (
    BITS,
    GROUPS,
    SCALE_DTYPES,
    Encoding,
    decode_e2m1,
)
from qwen3next_plugin.model.checkpoint.errors import MIXED, CheckpointError

DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
    "bf16": torch.bfloat16,
    "nvfp4": torch.uint8,
    "mxfp4": torch.uint8,
}
CHANNEL_SCALE = "weight_channel_scale"
CHUNK = 1 << 20  # values dequantised at once, because a whole head would take three times its size
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight [N, K] is stored.

    encoding: `fp8` (e4m3); `int8`; `int4`, `nvfp4` or `mxfp4`: two columns a byte, the lower
        nibble first; or `bf16`, without scales. nvfp4 also has a scale per channel.
    group: columns that share a scale (the last group of fp8 may be smaller); 0: all of them.
    zeros: int4 has a zero point per scale; otherwise its zero point is 8.
    """

    encoding: Encoding
    group: int
    scale: torch.dtype
    zeros: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of a module's tensors."""
        if self.encoding == "bf16":
            return ("weight",)
        more = ("weight_zero",) if self.zeros else ()
        if self.encoding == "nvfp4":
            more = (CHANNEL_SCALE,)
        return ("weight", "weight_scale", *more)

    def by_column(self, name: str) -> bool:
        """Whether the second dim of a tensor goes along the columns."""
        return name == "weight" or (self.group > 0 and name != CHANNEL_SCALE)

    def tensors(
        self, channels: int, columns: int
    ) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Name, shape and dtype of a module's tensors."""
        groups = -(-columns // (self.group or columns))
        width = columns // 2 if BITS[self.encoding] == 4 else columns
        every = {
            "weight": ((channels, width), DTYPES[self.encoding]),
            "weight_scale": ((channels, groups), self.scale),
            "weight_zero": ((channels, groups), torch.uint8),
            CHANNEL_SCALE: ((channels, 1), torch.float32),
        }
        return {name: every[name] for name in self.names}

    def described(self) -> str:
        """The format in words, for an error."""
        scales = f"scales of {self.group} columns" if self.group else "scales of whole channels"
        zeros = " and zero points" if self.zeros else ""
        return f"{self.encoding} with {scales} in {str(self.scale).removeprefix('torch.')}{zeros}"

    def nbytes(self, channels: int, columns: int) -> int:
        """Bytes of a module's tensors."""
        return _nbytes(self, channels, columns)


@cache  # a model has thousands of experts of one size
def _nbytes(form: Format, channels: int, columns: int) -> int:
    parts = form.tensors(channels, columns).values()
    return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


@dataclass(frozen=True, slots=True)
class InPanels(Format):
    """The format of a weight that the files have packed; it gets no parameters.

    shape: (N, K), or (E, N, K) of experts.
    parts: output channels of what is stacked in it; a rank has a share of each.
    """

    shape: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def packed_names(self) -> tuple[str, ...]:
        """Last names of its tensors in the files, which are the fields of `PackedWeight`."""
        return ("packed", "scale") + (("zero",) if self.zeros else ())


BF16 = Format("bf16", 0, torch.bfloat16)  # of weights that are not quantised


def nibbles(weight: Tensor) -> Tensor:
    """Shapes: weight [N, K/2] uint8, the lower nibble first, returns [N, K]."""
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2)


def dequantise(tensors: Tensors, form: Format) -> Tensor:
    """Shapes: those of `Format.tensors(N, K)`, returns [N, K] fp32."""
    N, width = tensors["weight"].shape
    K = 2 * width if BITS[form.encoding] == 4 else width
    found = torch.empty(N, K, device=tensors["weight"].device)
    channels = max(1, CHUNK // K)
    for begin in range(0, N, channels):
        part = slice(begin, begin + channels)
        found[part] = _dequantise({name: each[part] for name, each in tensors.items()}, form)
    return found


def _dequantise(tensors: Tensors, form: Format) -> Tensor:
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if BITS[form.encoding] == 4:
        weight = nibbles(weight)
    if form.encoding in ("nvfp4", "mxfp4"):
        weight = decode_e2m1(weight)
    if CHANNEL_SCALE in tensors:
        scale = scale.float() * tensors[CHANNEL_SCALE]
    K = weight.shape[1]

    def by_column(each: Tensor) -> Tensor:
        return each.float().repeat_interleave(form.group or K, dim=1)[:, :K]

    weight = weight.float()
    if form.encoding == "int4":
        weight -= by_column(tensors["weight_zero"]) if form.zeros else 8
    return weight * by_column(scale)


class Module(NamedTuple):
    """A quantised module of a checkpoint: its weight [N, K] and its tensors by their last name."""

    name: str
    channels: int
    columns: int
    tensors: Tensors
    less: int = 1  # GPTQ stores zero points less this; 0 in its second version

    def refuse(self, what: str, fix: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}; {fix}")

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].shape)

    def check_weight(self) -> None:
        """Refuse values of another shape than the config's. Raises: CheckpointError."""
        expected = (self.channels, self.columns)
        if (shape := self.shape("weight")) != expected:
            raise self.refuse(f"weight has shape {shape}, the config asks for {expected}", MIXED)

    def check_shape(self, name: str, *served: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, if it is there. Raises: CheckpointError."""
        if name in self.tensors and (found := self.shape(name)) not in served:
            raise self.refuse(
                f"{name} has shape {found}, where {served[0]} fits", "download the checkpoint again"
            )

    def group(self, groups: int, scales: str) -> int:
        """Columns that share a scale, from the number of groups; 0: all."""
        if groups == 1:
            return 0
        if groups < 1 or self.columns % groups:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has {groups} groups for {self.columns} columns, "
                f"which they do not divide",
                "quantise with a group size that divides the columns",
            )
        if (group := self.columns // groups) not in GROUPS:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has a scale for each {group} columns",
                f"quantise with groups of {', '.join(map(str, GROUPS))} columns or all of them",
            )
        return group


class Scheme(NamedTuple):
    """The tensors of a module that is quantised in one way, and how to read them."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    format: Callable[[Module], Format]  # by headers alone
    read: Callable[[Module], dict[str, Tensor]]  # in that format
    scales: tuple[torch.dtype, ...] = SCALE_DTYPES  # their dtypes
