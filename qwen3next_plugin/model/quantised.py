"""How quantised tensors are stored: in our parameters by rows, in checkpoints by several schemes.

Our parameters have one form for all schemes, in which every tensor of a module has the module's
rows as its first dimension: stacking, sharding and regrouping move all of them alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packing import GROUPS
from qwen3next_plugin.model.checkpoint.errors import CheckpointError

FP8_BLOCK = 128  # rows and columns that share a scale in the FP8 checkpoints of Qwen
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble in which AWQ keeps each of eight rows
DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int4": torch.uint8,
    "bf16": torch.bfloat16,
}
Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Format:
    """How the rows of a weight [N, K] are stored.

    name: `fp8` (e4m3), `int8`, or `int4`: two columns a byte, the lower nibble first; or `bf16`,
        without scales.
    group: columns that share a scale, of fp8 the last group maybe fewer; 0: the row has one scale.
    zeros: int4 has a zero point beside each scale; without, the zero is 8.
    """

    name: str
    group: int
    scale: torch.dtype
    zeros: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Of a module's tensors."""
        if self.name == "bf16":
            return ("weight",)
        return ("weight", "weight_scale") + (("weight_zero",) if self.zeros else ())

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, int], torch.dtype]]:
        """Name, shape and dtype of a module's tensors."""
        groups = self.groups(columns)
        every = {
            "weight": ((rows, columns // 2 if self.name == "int4" else columns), DTYPES[self.name]),
            "weight_scale": ((rows, groups), self.scale),
            "weight_zero": ((rows, groups), torch.uint8),
        }
        return {name: every[name] for name in self.names}

    def groups(self, columns: int) -> int:
        """Scales of a row."""
        return -(-columns // (self.group or columns))

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a module's tensors."""
        parts = self.tensors(rows, columns).values()
        return sum(prod(shape) * dtype.itemsize for shape, dtype in parts)


BF16 = Format("bf16", 0, torch.bfloat16)  # of weights that are not quantised


class Module(NamedTuple):
    """A quantised module of a checkpoint: its weight [N, K] and its tensors by their last name."""

    name: str
    rows: int
    columns: int
    tensors: Tensors
    less: int = 1  # GPTQ stores zero points less this; 0 in its second version

    def refuse(self, what: str, fix: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}; {fix}")

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].shape)

    def group(self, groups: int, scales: str) -> int:
        """Columns of a group, of which there are so many in a row; 0: all."""
        if groups == 1:
            return 0
        if groups < 1 or self.columns % groups:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has {groups} groups in a row of {self.columns} "
                f"columns, which they do not divide",
                "quantise with a group size that divides the columns",
            )
        if (group := self.columns // groups) not in GROUPS:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has a scale for each {group} columns",
                f"quantise with groups of {', '.join(map(str, GROUPS))} or the whole row",
            )
        return group


class Scheme(NamedTuple):
    """Tensors of a module that is quantised so, and what they say."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    format: Callable[[Module], Format]  # by headers alone
    rows: Callable[[Module], dict[str, Tensor]]  # in our form


def nibbles(weight: Tensor) -> Tensor:
    """Shapes: weight [N, K/2] uint8, the lower nibble first, returns [N, K]."""
    return torch.stack([weight & 15, weight >> 4], dim=-1).flatten(1)


def dequantise(tensors: Tensors, form: Format) -> Tensor:
    """Shapes: those of `Format.tensors(N, K)`, returns [N, K] fp32."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if form.name == "int4":
        weight = nibbles(weight)
    K = weight.shape[1]

    def by_column(each: Tensor) -> Tensor:
        return each.float().repeat_interleave(form.group or K, dim=1)[:, :K]

    weight = weight.float()
    if form.name == "int4":
        weight -= by_column(tensors["weight_zero"]) if form.zeros else 8
    return weight * by_column(scale)


# FP8, and int8 by rows ---------------------------------------------------------------------------


def _block_format(module: Module) -> Format:
    name = "weight_scale_inv"
    blocks = (-(-module.rows // FP8_BLOCK), -(-module.columns // FP8_BLOCK))
    if module.shape(name) != blocks:
        raise module.refuse(
            f"{name} has shape {module.shape(name)}, and blocks of {FP8_BLOCK} by {FP8_BLOCK} need "
            f"{blocks}",
            f"use a checkpoint with blocks of {FP8_BLOCK} by {FP8_BLOCK}",
        )
    return Format("fp8", FP8_BLOCK if blocks[1] > 1 else 0, module.tensors[name].dtype)


def _block_rows(module: Module) -> dict[str, Tensor]:
    scale = module.tensors["weight_scale_inv"]
    scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[: module.rows]
    return {"weight": module.tensors["weight"], "weight_scale": scale}


def _scaled_format(module: Module) -> Format:
    """A scale of the whole tensor, of each row, of groups of a row, or (FP8) of each block."""
    name = "weight_scale"
    is_fp8 = module.tensors["weight"].dtype == torch.float8_e4m3fn
    shape, rows = module.shape(name), module.rows
    blocks = (-(-rows // FP8_BLOCK), -(-module.columns // FP8_BLOCK))
    kind, dtype = "fp8" if is_fp8 else "int8", module.tensors[name].dtype
    if shape in ((), (1,), (rows,), (rows, 1)):
        return Format(kind, 0, dtype)
    if is_fp8 and shape in (blocks, (rows, blocks[1])):
        return Format(kind, FP8_BLOCK if blocks[1] > 1 else 0, dtype)
    if is_fp8:
        raise module.refuse(
            f"{name} has shape {shape}, which is no scale of {rows} rows, nor of blocks or groups "
            f"of {FP8_BLOCK} columns",
            f"use a checkpoint with a scale of each row, or with groups of {FP8_BLOCK} in FP8",
        )
    if len(shape) == 2 and shape[0] == rows:
        return Format(kind, module.group(shape[1], name), dtype)
    raise module.refuse(
        f"{name} has shape {shape}, which is no scale of {rows} rows",
        "use a checkpoint with a scale of each row",
    )


def _scaled_rows(module: Module) -> dict[str, Tensor]:
    if "weight_zero_point" in module.tensors and module.tensors["weight_zero_point"].any():
        raise module.refuse(
            "weight_zero_point is not zero", "use a checkpoint with symmetric int8 weights"
        )
    scale = module.tensors["weight_scale"]
    if scale.ndim == 2 and len(scale) != module.rows and scale.numel() > 1:
        scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[: module.rows]
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    return {
        "weight": module.tensors["weight"],
        "weight_scale": scale.expand(module.rows, -1).contiguous(),
    }


# integers in words of 32 bits --------------------------------------------------------------------


def _packed_format(module: Module) -> Format:
    """compressed-tensors' `pack-quantized`: [N, K·bits/32] words, the first column lowest."""
    scales = "weight_scale"
    bits = _bits(module, "weight_packed", (module.rows, module.columns), dim=1)
    shape = module.shape(scales)
    if len(shape) != 2 or shape[0] != module.rows:
        raise module.refuse(
            f"{scales} has shape {shape}, which is no scale of {module.rows} rows",
            "use a checkpoint with a scale of each row or group",
        )
    zeros = bits == 4 and "weight_zero_point" in module.tensors
    return Format(f"int{bits}", module.group(shape[1], scales), module.tensors[scales].dtype, zeros)


def _packed_rows(module: Module) -> dict[str, Tensor]:
    scale, zero = module.tensors["weight_scale"], module.tensors.get("weight_zero_point")
    bits = _bits(module, "weight_packed", (module.rows, module.columns), dim=1)
    if zero is not None and zero.dtype == torch.int32:  # words along the rows
        zero = _unpacked(zero.T.contiguous(), bits)[:, : module.rows].T
    elif zero is not None:
        zero = (zero.short() + (1 << bits - 1)).to(torch.uint8)
    values = _unpacked(module.tensors["weight_packed"], bits)[:, : module.columns]
    return _in_our_form(module, bits, values, scale, zero, "weight_g_idx")


def _words_format(module: Module) -> Format:
    """GPTQ, words along the columns: [K·bits/32, N]; or AWQ, along the rows: [K, N·bits/32]."""
    scales = "scales"
    if len(shape := module.shape(scales)) != 2 or shape[1] != module.rows:
        raise module.refuse(
            f"{scales} has shape {shape}, which is no scale of {module.rows} rows",
            "use a checkpoint with a scale of each row or group",
        )
    bits = _bits(module, "qweight", (module.columns, module.rows), dim=1 if _is_awq(module) else 0)
    group, dtype = module.group(shape[0], scales), module.tensors[scales].dtype
    return Format(f"int{bits}", group, dtype, zeros=bits == 4)


def _is_awq(module: Module) -> bool:
    return module.shape("qweight")[:1] == (module.columns,)


def _words_rows(module: Module) -> dict[str, Tensor]:
    scale = module.tensors["scales"].T
    if _is_awq(module):
        bits = 4
        weight, zero = (
            _unpacked(module.tensors[name], bits).unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1).T
            for name in ("qweight", "qzeros")
        )
    else:
        bits = _bits(module, "qweight", (module.columns, module.rows), dim=0)
        weight = _unpacked(module.tensors["qweight"].T, bits)
        zero = _unpacked(module.tensors["qzeros"], bits).T + module.less & (1 << bits) - 1
    return _in_our_form(module, bits, weight, scale, zero, "g_idx")


def _bits(module: Module, name: str, shape: tuple[int, int], *, dim: int) -> int:
    """Bits of a value in words that lie along `dim` of a weight of this shape."""
    found = module.shape(name)
    for bits in (4, 8):
        words = list(shape)
        words[dim] = -(-shape[dim] * bits // 32)
        if found == tuple(words):
            return bits
    raise module.refuse(
        f"{name} has shape {found}, which is neither 4 nor 8 bits for each value of a weight of "
        f"{module.rows} rows and {module.columns} columns",
        "use a checkpoint in 4 or 8 bits",
    )


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Shapes: words [R, W] int32, returns [R, W·32/bits] uint8, the lowest bits first."""
    values = words.contiguous().flatten().view(torch.uint8).unflatten(0, (len(words), -1))
    if bits == 8:
        return values
    return nibbles(values)


def _in_our_form(
    module: Module, bits: int, values: Tensor, scale: Tensor, zero: Tensor | None, order: str
) -> dict[str, Tensor]:
    """Shapes: values [N, K] and zero [N, G] unsigned, scale [N, G]."""
    _check_order(module, order, scale.shape[1])
    found = {"weight": values.contiguous(), "weight_scale": scale.contiguous()}
    if bits == 8:
        if zero is not None and (zero != 128).any():
            raise module.refuse(
                "8-bit values have zero points other than 128", "use symmetric 8-bit weights"
            )
        found["weight"] = (found["weight"] ^ 128).view(torch.int8)
        return found
    if zero is not None:
        found["weight_zero"] = zero.contiguous()
    found["weight"] = found["weight"][:, ::2] | found["weight"][:, 1::2] << 4
    return found


def _check_order(module: Module, name: str, groups: int) -> None:
    """Refuse columns that are quantised in another order than they are stored in."""
    if (found := module.tensors.get(name)) is None:
        return
    columns = torch.arange(module.columns, device=found.device)
    if (found != columns // (module.columns // groups)).any():
        raise module.refuse(
            f"{name} reorders columns (desc_act, or actorder: group), which no kernel here does",
            "use a checkpoint made without it",
        )


SCHEMES: Mapping[tuple[str, torch.dtype], Scheme] = {  # by the tensor that has the values
    ("weight", torch.float8_e4m3fn): Scheme(
        ("weight", "weight_scale"), ("input_scale",), _scaled_format, _scaled_rows
    ),
    ("weight", torch.int8): Scheme(
        ("weight", "weight_scale"),
        ("input_scale", "weight_zero_point"),
        _scaled_format,
        _scaled_rows,
    ),
    ("weight_packed", torch.int32): Scheme(
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
        _packed_format,
        _packed_rows,
    ),
    ("qweight", torch.int32): Scheme(
        ("qweight", "qzeros", "scales"), ("g_idx",), _words_format, _words_rows
    ),
}
IN_BLOCKS = Scheme(("weight", "weight_scale_inv"), ("input_scale",), _block_format, _block_rows)


def scheme(tensors: Tensors) -> Scheme | None:
    """That of a module with these tensors, by names and dtypes; None: unknown."""
    for name, tensor in tensors.items():
        if found := SCHEMES.get((name, tensor.dtype)):
            is_fp8 = tensor.dtype == torch.float8_e4m3fn
            return IN_BLOCKS if is_fp8 and "weight_scale_inv" in tensors else found
    return None
