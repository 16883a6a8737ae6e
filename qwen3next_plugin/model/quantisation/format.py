"""How a weight is stored in our parameters: one form, whatever scheme the checkpoint has.

Every tensor of a module has the module's output channels as its first dimension, so stacking,
sharding and regrouping move all of them alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import Encoding

DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
    "bf16": torch.bfloat16,
}
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """How a weight [N, K] is stored.

    encoding: `fp8` (e4m3), `int8`, or `int4`: two columns a byte, the lower nibble first; or
        `bf16`, without scales.
    group: columns that share a scale, of fp8 the last group maybe fewer; 0: all of them.
    zeros: int4 has a zero point beside each scale; without, the zero is 8.
    """

    encoding: Encoding
    group: int
    scale: torch.dtype
    zeros: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of a module's tensors."""
        if self.encoding == "bf16":
            return ("weight",)
        return ("weight", "weight_scale") + (("weight_zero",) if self.zeros else ())

    def tensors(
        self, channels: int, columns: int
    ) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Name, shape and dtype of a module's tensors."""
        groups = -(-columns // (self.group or columns))
        width = columns // 2 if self.encoding == "int4" else columns
        every = {
            "weight": ((channels, width), DTYPES[self.encoding]),
            "weight_scale": ((channels, groups), self.scale),
            "weight_zero": ((channels, groups), torch.uint8),
        }
        return {name: every[name] for name in self.names}

    def nbytes(self, channels: int, columns: int) -> int:
        """Bytes of a module's tensors."""
        parts = self.tensors(channels, columns).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


@dataclass(frozen=True, slots=True)
class InPanels(Format):
    """Of a weight that the files have packed: no parameters are made for it.

    shape: (N, K), or (E, N, K) of experts.
    parts: output channels of what is stacked in it; a rank has a share of each.
    """

    shape: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()

    @property
    def packed_names(self) -> tuple[str, ...]:
        """Of the tensors in the files, those of `PackedWeight`."""
        return ("packed", "scale") + (("zero",) if self.zeros else ())


BF16 = Format("bf16", 0, torch.bfloat16)  # of weights that are not quantised


def nibbles(weight: Tensor) -> Tensor:
    """Shapes: weight [N, K/2] uint8, the lower nibble first, returns [N, K]."""
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(-2)


def joined(values: Tensor) -> Tensor:
    """The inverse of `nibbles`."""
    return values[..., ::2] | values[..., 1::2] << 4


def dequantise(tensors: Tensors, form: Format) -> Tensor:
    """Shapes: those of `Format.tensors(N, K)`, returns [N, K] fp32."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if form.encoding == "int4":
        weight = nibbles(weight)
    K = weight.shape[1]

    def by_column(each: Tensor) -> Tensor:
        return each.float().repeat_interleave(form.group or K, dim=1)[:, :K]

    weight = weight.float()
    if form.encoding == "int4":
        weight -= by_column(tensors["weight_zero"]) if form.zeros else 8
    return weight * by_column(scale)
