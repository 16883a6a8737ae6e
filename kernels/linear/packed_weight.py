"""A matrix as the kernels read it: in panels of 16 output channels, interleaved."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import ACTIVATIONS

PANEL = 16  # output channels of a panel: the fp32 lanes of AVX-512
BLOCK = 128  # the last dim is padded to a multiple of it
Encoding = Literal["int8", "int4", "fp8", "bf16", "nvfp4", "mxfp4"]  # of a value
# As in native/formats.h.
ENCODINGS: tuple[Encoding, ...] = ("int8", "int4", "fp8", "bf16", "nvfp4", "mxfp4")
BITS = {"int8": 8, "int4": 4, "fp8": 8, "bf16": 16, "nvfp4": 4, "mxfp4": 4}  # of a value
SCALE_DTYPES = ACTIVATIONS  # dtypes of the scales, but of FP4
GROUPS = (32, 64, 128)  # columns that may share a scale in int8 and int4
FP4_GROUPS: Mapping[Encoding, int] = {"nvfp4": 16, "mxfp4": 32}  # that do in FP4
GROUPS_OF: Mapping[Encoding, tuple[int, ...]] = {  # `PackedWeight.group`
    **dict.fromkeys(("int8", "int4"), (0, *GROUPS)),
    **{"fp8": (0, BLOCK), "bf16": (0,)},
    **{encoding: (group,) for encoding, group in FP4_GROUPS.items()},
}
FP4_SCALES: Mapping[Encoding, torch.dtype] = {
    "nvfp4": torch.float8_e4m3fn,
    "mxfp4": torch.float8_e8m0fnu,
}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; those of codes 8 to 15 are negative
BEFORE = 4  # of NVFP4: the bytes of an fp32 scale for each channel, as groups before the others
BYTES = (torch.uint8,)
Dtypes = tuple[torch.dtype, ...]
SYMMETRIC = 8  # the zero point of int4 without zero points


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """W = scale (values − zero), packed by a `pack_…`; in bf16 W itself, without scales.

    Shapes, of one matrix [N, K]; of experts all have a leading dim E:
        packed: [⌈N/16⌉, bytes] uint8. A byte holds an int8 or e4m3, or two int4 or e2m1 (FP4);
            columns are in pairs: within a panel [K/2, 16, 2] bytes (int8), or [K/8, 16, 2] words of
            16 bits, whose nibbles, lowest first, are 2 columns apart (int4, FP4); [K/4, 16, 2]
            words of 16 bits, whose bytes are 2 columns apart (fp8); [K/2, 16, 2] bf16
        scale: [⌈N/16⌉, groups, 16] fp32, bf16 or fp16; one group if `group` is 0, none of bf16.
            FP4: uint8, e8m0 (MXFP4) or e4m3 (NVFP4), there after 64 bytes with the channels' fp32
        zero: of int4, the same shape, uint8, or None: 8. The other encodings have none.
    """

    encoding: Encoding
    shape: tuple[int, ...]  # (N, K), or (E, N, K)
    group: int  # columns that share a scale: 16, 32, 64 or 128; 0: all of them
    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by name."""
        named = {"packed": self.packed, "scale": self.scale, "zero": self.zero}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


def unpack(weight: PackedWeight) -> Tensor:
    """W in fp32. Shapes: [N, K], or [E, N, K]"""
    *_, N, K = weight.shape
    values = _values(weight)  # [..., panels, columns, 16]
    if weight.encoding == "bf16":
        return values.transpose(-1, -2).flatten(-3, -2)[..., :N, :K]
    scale = _scales(weight)
    columns, groups = values.shape[-2], scale.shape[-2]
    zero: Tensor | int = SYMMETRIC if weight.encoding == "int4" else 0
    if weight.zero is not None:
        zero = weight.zero.float().repeat_interleave(weight.group or columns, -2)[..., :columns, :]
    scale = scale.repeat_interleave(columns if groups == 1 else weight.group, -2)
    w = (values - zero) * scale[..., :columns, :]
    return w.transpose(-1, -2).flatten(-3, -2)[..., :N, :K]


def _scales(weight: PackedWeight) -> Tensor:
    """In fp32. Shapes: [..., panels, groups, 16]"""
    scale = weight.scale
    if weight.encoding not in FP4_SCALES:
        return scale.float()
    before = BEFORE if weight.encoding == "nvfp4" else 0
    of_groups = scale[..., before:, :].view(FP4_SCALES[weight.encoding]).float()
    if not before:
        return of_groups
    of_channels = scale[..., :before, :].flatten(-2).view(torch.float32).unflatten(-1, (1, PANEL))
    return of_groups * of_channels


def take_channels(weight: PackedWeight, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Some output channels as they were packed: values, and their scales.

    Shapes: weight [N, K] int8 or bf16, channels [R], returns [R, K], [R, groups]

    Raises: ValueError for another encoding.
    """
    if weight.encoding not in ("int8", "bf16") or len(weight.shape) != 2:
        raise ValueError(
            f"take_channels: weight is {weight.encoding} {weight.shape}, not int8 or bf16 [N, K]"
        )
    is_int8, panel, lane = weight.encoding == "int8", channels // PANEL, channels % PANEL
    pairs = weight.packed.view(torch.int16 if is_int8 else torch.int32)
    pairs = pairs.unflatten(1, (-1, PANEL))[panel, :, lane]  # [R, K / 2]
    values = pairs.view(torch.int8 if is_int8 else torch.bfloat16)[:, : weight.shape[1]]
    return values, weight.scale[panel, :, lane]


def _values(weight: PackedWeight) -> Tensor:
    """The values as fp32 [..., panels, columns, 16]; columns includes the padding."""
    packed = weight.packed
    if weight.encoding in ("int8", "bf16"):
        dtype = torch.int8 if weight.encoding == "int8" else torch.bfloat16
        values = packed.view(dtype).float().unflatten(-1, (-1, PANEL, 2))
        return values.transpose(-1, -2).flatten(-3, -2)
    words = packed.view(torch.int16).int().unflatten(-1, (-1, 1, PANEL, 2))
    if BITS[weight.encoding] == 4:
        words = (words >> torch.arange(0, 16, 4).view(4, 1, 1)) & 15  # [..., chunks, 4, 16, 2]
        values = words.float() if weight.encoding == "int4" else decode_e2m1(words)
        return values.transpose(-1, -2).flatten(-4, -2)
    words = (words >> torch.tensor([0, 8]).view(2, 1, 1)) & 255
    values = words.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return values.transpose(-1, -2).flatten(-4, -2)


def joined(values: Tensor) -> Tensor:
    """Values of 4 bits [..., K], two a byte, the lower nibble first: [..., K / 2]."""
    return values[..., ::2] | values[..., 1::2] << 4


def decode_e2m1(codes: Tensor) -> Tensor:
    """Codes from 0 to 15 as fp32."""
    positive = torch.tensor(E2M1)
    return torch.cat([positive, -positive])[codes.long()]


def check_weight(op: str, name: str, weight: PackedWeight, dims: int, device: torch.device) -> None:
    """Raise ValueError unless the parts fit encoding, shape and group."""
    zero = weight.zero
    if len(weight.shape) != dims:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, not {dims} dims")
    if not weight.shape[-1]:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, no columns")
    if weight.group not in GROUPS_OF[weight.encoding]:
        raise ValueError(
            f"{op}: {name} is {weight.encoding} in groups of {weight.group}, not one of "
            f"{GROUPS_OF[weight.encoding]}"
        )
    if zero is not None and weight.encoding != "int4":
        raise ValueError(f"{op}: {name} is {weight.encoding} with zero points, which only int4 has")
    lines, entries = _shapes(weight.encoding, weight.shape, weight.group)
    scales = scale_dtypes(weight.encoding)
    if (
        _fits(weight.packed, lines, BYTES, device)
        and _fits(weight.scale, entries, scales, device)
        and (zero is None or _fits(zero, entries, BYTES, device))
    ):
        return
    _refuse(f"{op}: {name}.packed", weight.packed, lines, BYTES, device)
    _refuse(f"{op}: {name}.scale", weight.scale, entries, scales, device)
    if zero is not None:
        _refuse(f"{op}: {name}.zero", zero, entries, BYTES, device)


def _fits(x: Tensor, shape: tuple[int, ...], dtypes: Dtypes, device: torch.device) -> bool:
    return x.dtype in dtypes and x.shape == shape and x.is_contiguous() and x.device == device


def _refuse(
    name: str, x: Tensor, shape: tuple[int, ...], dtypes: Dtypes, device: torch.device
) -> None:
    """Raise ValueError with the reason unless x fits."""
    if x.dtype not in dtypes:
        raise ValueError(f"{name} is {x.dtype}, not {', '.join(map(str, dtypes))}")
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, strides {x.stride()}, not {shape} without gaps"
        )
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, not on {device}")


def scale_dtypes(encoding: Encoding) -> Dtypes:
    """Those that `PackedWeight.scale` may have."""
    return BYTES if encoding in FP4_SCALES else SCALE_DTYPES


PackedShapes = tuple[tuple[int, ...], tuple[int, ...]]


@torch.compiler.assume_constant_result  # of a cache that it traces, torch.compile warns
def _shapes(encoding: Encoding, shape: tuple[int, ...], group: int) -> PackedShapes:
    """Those of `packed`, and of `scale` and `zero`; computed once, since every call asks."""
    return packed_shapes(encoding, shape, group)


@functools.lru_cache
def packed_shapes(encoding: Encoding, shape: tuple[int, ...], group: int) -> PackedShapes:
    """Those of `packed`, and of `scale` and `zero`, of a weight [N, K] or [E, N, K]."""
    *lead, N, K = shape
    padded = -(-K // (group or BLOCK)) * (group or BLOCK)
    panels, line = -(-N // PANEL), PANEL * padded * BITS[encoding] // 8
    groups = 0 if encoding == "bf16" or not K else -(-K // (group or K))
    groups += BEFORE if encoding == "nvfp4" else 0
    return (*lead, panels, line), (*lead, panels, groups, PANEL)


def stack(weights: Iterable[PackedWeight], num_experts: int) -> PackedWeight:
    """Matrices [N, K] as experts [E, N, K], one by one.

    Raises: ValueError unless they are alike, and as many as `num_experts`.
    """
    found = Stack(num_experts)
    for e, one in enumerate(weights):
        found.put(e, one)
    return found.whole()


class Stack:
    """Experts [E, N, K], of which each [N, K] is put into its place when it is there."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts, self._put = num_experts, set[int]()
        self._first: PackedWeight | None = None
        self._whole: dict[str, Tensor] = {}

    def put(self, e: int, one: PackedWeight) -> None:
        """Copy expert e. Raises: ValueError unless it is like the first one."""
        if self._first is None:
            self._first = one
            tensors = one.tensors.items()
            self._whole = {n: t.new_empty(self.num_experts, *t.shape) for n, t in tensors}
        if _kind(one) != _kind(self._first):
            raise ValueError(
                f"stack: encoding, group, shape, dtype of scales, tensors: {_kind(one)} of matrix "
                f"{e}, {_kind(self._first)} of the first"
            )
        if e < self.num_experts:
            for name, tensor in one.tensors.items():
                self._whole[name][e].copy_(tensor)
        self._put.add(e)

    def whole(self) -> PackedWeight:
        """All experts. Raises: ValueError unless each is put."""
        if self._first is None or len(self._put) != self.num_experts:
            raise ValueError(f"stack: {len(self._put)} matrices of {self.num_experts} experts")
        return replace(
            self._first,
            shape=(self.num_experts, *self._first.shape),
            packed=self._whole["packed"],
            scale=self._whole["scale"],
            zero=self._whole.get("zero"),
        )


def _kind(weight: PackedWeight) -> tuple:
    return weight.encoding, weight.group, weight.shape, weight.scale.dtype, (*weight.tensors,)
