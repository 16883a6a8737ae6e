"""A matrix as the kernels read it: 16 rows interleaved, in tiles."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import ACTIVATIONS

TILE = 16  # rows of a tile: the fp32 lanes of AVX-512
BLOCK = 128  # the last dim is padded to a multiple of it
Format = Literal["int8", "int4", "fp8", "bf16"]
FORMATS: tuple[Format, ...] = ("int8", "int4", "fp8", "bf16")  # as in native/formats.h
# A row's part of a line.
LINE = {"int8": torch.int16, "int4": torch.int32, "fp8": torch.int32, "bf16": torch.int32}
BITS = {"int8": 8, "int4": 4, "fp8": 8, "bf16": 16}  # of a value
SCALES = ACTIVATIONS  # dtypes of the scales
BYTES = (torch.uint8,)
Dtypes = tuple[torch.dtype, ...]
SYMMETRIC = 8  # the zero point of int4 without zero points


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """W = scale (values − zero), packed by a `pack_…`; in bf16 W itself, without scales.

    Shapes, of one matrix [N, K]; of experts all have a leading dim E:
        packed: [⌈N/16⌉, bytes] uint8. A byte holds an int8 or e4m3, or two int4; columns are in
            pairs: within a tile [K/2, 16, 2] bytes (int8), or [K/8, 16, 2] words of 16 bits, whose
            nibbles, lowest first, are 2 columns apart (int4); [K/4, 16, 2] words of 16 bits, whose
            bytes are 2 columns apart (fp8); [K/2, 16, 2] bf16
        scale: [⌈N/16⌉, groups, 16] fp32, bf16 or fp16; one group if `group` is 0, none of bf16
        zero: of int4, the same shape, uint8, or None: 8. The other formats have none.
    """

    format: Format
    shape: tuple[int, ...]  # (N, K), or (E, N, K)
    group: int  # columns that share a scale: 32, 64 or 128; 0: the whole row
    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(t.nbytes for t in (self.packed, self.scale, self.zero) if t is not None)

    def expert(self, e: int) -> "Weight":
        """The matrix of one expert, as views."""
        return self._with(self.shape[1:], lambda t: t[e])

    def _with(self, shape: tuple[int, ...], f: Callable[[Tensor], Tensor]) -> "Weight":
        zero = None if self.zero is None else f(self.zero)
        return replace(self, shape=shape, packed=f(self.packed), scale=f(self.scale), zero=zero)


def unpack(weight: Weight) -> Tensor:
    """W in fp32. Shapes: [N, K], or [E, N, K]"""
    *_, N, K = weight.shape
    values = _values(weight)  # [..., tiles, columns, 16]
    if weight.format == "bf16":
        return values.transpose(-1, -2).flatten(-3, -2)[..., :N, :K]
    columns, groups = values.shape[-2], weight.scale.shape[-2]
    scale = weight.scale.float()
    zero: Tensor | int = SYMMETRIC if weight.format == "int4" else 0
    if weight.zero is not None:
        zero = weight.zero.float().repeat_interleave(weight.group or columns, -2)[..., :columns, :]
    scale = scale.repeat_interleave(columns if groups == 1 else weight.group, -2)
    w = (values - zero) * scale[..., :columns, :]
    return w.transpose(-1, -2).flatten(-3, -2)[..., :N, :K]


def take_rows(weight: Weight, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Some rows of a matrix as they were packed: values, and their scales.

    Shapes: weight [N, K] int8 or bf16, rows [R], returns [R, K], [R, groups]

    Raises: ValueError for another format.
    """
    dtype = {"int8": torch.int8, "bf16": torch.bfloat16}.get(weight.format)
    if dtype is None or len(weight.shape) != 2:
        raise ValueError(
            f"take_rows: weight is {weight.format} {weight.shape}, not int8 or bf16 [N, K]"
        )
    tile, lane = rows // TILE, rows % TILE
    lines = weight.packed.view(LINE[weight.format]).unflatten(1, (-1, TILE))  # [tiles, K / 2, 16]
    values = lines[tile, :, lane].view(dtype)[:, : weight.shape[1]]
    return values, weight.scale[tile, :, lane]


def _values(weight: Weight) -> Tensor:
    """The values as fp32 [..., tiles, columns, 16]; columns includes the padding."""
    packed = weight.packed
    if weight.format in ("int8", "bf16"):
        dtype = torch.int8 if weight.format == "int8" else torch.bfloat16
        values = packed.view(dtype).float().unflatten(-1, (-1, TILE, 2))
        return values.transpose(-1, -2).flatten(-3, -2)
    words = packed.view(torch.int16).int().unflatten(-1, (-1, 1, TILE, 2))
    if weight.format == "int4":
        words = (words >> torch.arange(0, 16, 4).view(4, 1, 1)) & 15  # [..., chunks, 4, 16, 2]
        return words.float().transpose(-1, -2).flatten(-4, -2)
    words = (words >> torch.tensor([0, 8]).view(2, 1, 1)) & 255
    values = words.to(torch.uint8).view(torch.float8_e4m3fn).float()
    return values.transpose(-1, -2).flatten(-4, -2)


def check_weight(op: str, name: str, weight: Weight, dims: int, device: torch.device) -> None:
    """Raise ValueError unless the parts are those that format, shape and group ask for."""
    zero = weight.zero
    if len(weight.shape) != dims:
        raise ValueError(f"{op}: {name} has shape {weight.shape}, not {dims} dims")
    if zero is not None and weight.format != "int4":
        raise ValueError(f"{op}: {name} is {weight.format} with zero points, which only int4 has")
    lines, entries = _shapes(weight.format, weight.shape, weight.group)
    if (
        _fits(weight.packed, lines, BYTES, device)
        and _fits(weight.scale, entries, SCALES, device)
        and (zero is None or _fits(zero, entries, BYTES, device))
    ):
        return
    _refuse(f"{op}: {name}.packed", weight.packed, lines, BYTES, device)
    _refuse(f"{op}: {name}.scale", weight.scale, entries, SCALES, device)
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


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@torch.compiler.assume_constant_result  # of a cache that it traces, torch.compile warns
def _shapes(format: Format, shape: tuple[int, ...], group: int) -> Shapes:
    """Those of `packed`, and of `scale` and `zero`; computed once, since every call asks."""
    return _computed(format, shape, group)


@functools.lru_cache
def _computed(format: Format, shape: tuple[int, ...], group: int) -> Shapes:
    *lead, N, K = shape
    padded = -(-K // (group or BLOCK)) * (group or BLOCK)
    tiles, line = -(-N // TILE), TILE * padded * BITS[format] // 8
    groups = 0 if format == "bf16" or not K else -(-K // (group or K))
    return (*lead, tiles, line), (*lead, tiles, groups, TILE)


def concatenate(weights: Sequence[Weight]) -> Weight:
    """The rows of several matrices [N, K] in one, also where N is no multiple of 16.

    Raises: ValueError unless format, group, columns and kinds of scale and zero point agree.
    """
    first = _alike("concatenate", weights)
    N, K = sum(w.shape[0] for w in weights), first.shape[1]

    def joined(name: str) -> Tensor:
        line = LINE[first.format] if name == "packed" else None
        rows = torch.cat([_rows(getattr(w, name), w.shape[0], line) for w in weights])
        return _tiles(rows, line)

    zero = None if first.zero is None else joined("zero")
    return replace(first, shape=(N, K), packed=joined("packed"), scale=joined("scale"), zero=zero)


def stack(weights: Sequence[Weight]) -> Weight:
    """Matrices [N, K] as experts [E, N, K]. Raises: ValueError unless they are alike."""
    first = _alike("stack", weights)
    if any(w.shape != first.shape for w in weights):
        raise ValueError(f"stack: shapes differ: {sorted({w.shape for w in weights})}")

    def stacked(name: str) -> Tensor:
        return torch.stack([getattr(w, name) for w in weights])

    zero, shape = None if first.zero is None else stacked("zero"), (len(weights), *first.shape)
    return replace(first, shape=shape, packed=stacked("packed"), scale=stacked("scale"), zero=zero)


def _alike(op: str, weights: Sequence[Weight]) -> Weight:
    def kind(w: Weight) -> tuple:
        return w.format, w.group, len(w.shape), w.shape[-1], w.scale.dtype, w.zero is not None

    for i, w in enumerate(weights):
        if kind(w) != kind(weights[0]):
            raise ValueError(
                f"{op}: format, group, dims, columns, dtype of scales, has zero points: {kind(w)}"
                f" of matrix {i}, {kind(weights[0])} of the first"
            )
    return weights[0]


def _rows(tiles: Tensor, N: int, line: torch.dtype | None) -> Tensor:
    """[tiles, ...] as rows [N, ...]; with entries of such a dtype, unless that is None."""
    lines = tiles if line is None else tiles.view(line)
    entries = lines[0].numel() // TILE if len(lines) else 0
    return lines.reshape(len(tiles), entries, TILE).transpose(1, 2).flatten(0, 1)[:N]


def _tiles(rows: Tensor, line: torch.dtype | None) -> Tensor:
    """The inverse of `_rows`, padded with zeros to whole tiles."""
    padded = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % TILE))
    lines = padded.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()  # [tiles, lines, 16]
    return lines if line is None else lines.flatten(1).view(torch.uint8)
