"""How checkpoints store a quantised module: FP8, int8, GPTQ, AWQ, compressed-tensors; FP4."""

from collections.abc import Mapping

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import Encoding
from qwen3next_plugin.model.quantisation import fp4
from qwen3next_plugin.model.quantisation.format import Format, Module, Scheme, Tensors, nibbles

FP8_BLOCK = 128  # output channels and columns that share a scale in the FP8 checkpoints of Qwen
INTEGERS: Mapping[int, Encoding] = {4: "int4", 8: "int8"}  # by their bits
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble in which AWQ keeps each of eight output channels


# FP8, and int8 that is not packed ----------------------------------------------------------------


def _block_format(module: Module) -> Format:
    name = "weight_scale_inv"
    blocks = (-(-module.channels // FP8_BLOCK), -(-module.columns // FP8_BLOCK))
    if module.shape(name) != blocks:
        raise module.refuse(
            f"{name} has shape {module.shape(name)}, and blocks of {FP8_BLOCK} by {FP8_BLOCK} need "
            f"{blocks}",
            f"use a checkpoint with blocks of {FP8_BLOCK} by {FP8_BLOCK}",
        )
    return Format("fp8", FP8_BLOCK if blocks[1] > 1 else 0, module.tensors[name].dtype)


def _scaled_format(module: Module) -> Format:
    """A scale of all values, of each output channel, of groups of columns, or (FP8) of blocks."""
    name = "weight_scale"
    is_fp8 = module.tensors["weight"].dtype == torch.float8_e4m3fn
    shape, channels = module.shape(name), module.channels
    blocks = (-(-channels // FP8_BLOCK), -(-module.columns // FP8_BLOCK))
    encoding: Encoding = "fp8" if is_fp8 else "int8"
    dtype = module.tensors[name].dtype
    if shape in ((), (1,), (channels,), (channels, 1)):
        return Format(encoding, 0, dtype)
    if is_fp8 and shape in (blocks, (channels, blocks[1])):
        return Format(encoding, FP8_BLOCK if blocks[1] > 1 else 0, dtype)
    if is_fp8:
        raise module.refuse(
            f"{name} has shape {shape}, which is no scale of {channels} output channels, nor of "
            f"blocks or groups of {FP8_BLOCK} columns",
            f"use a checkpoint with a scale of each output channel, or with groups of {FP8_BLOCK}",
        )
    if len(shape) == 2 and shape[0] == channels:
        return Format(encoding, module.group(shape[1], name), dtype)
    raise module.refuse(
        f"{name} has shape {shape}, which is no scale of {channels} output channels",
        "use a checkpoint with a scale of each output channel",
    )


def _read_scaled(module: Module) -> dict[str, Tensor]:
    if "weight_zero_point" in module.tensors and module.tensors["weight_zero_point"].any():
        raise module.refuse(
            "weight_zero_point is not zero", "use a checkpoint with symmetric int8 weights"
        )
    scale = module.tensors.get("weight_scale_inv", module.tensors.get("weight_scale"))
    assert scale is not None
    if scale.ndim == 2 and len(scale) != module.channels and scale.numel() > 1:
        scale = scale.repeat_interleave(FP8_BLOCK, dim=0)[: module.channels]
    if scale.ndim < 2:
        scale = scale.reshape(-1, 1)
    return {
        "weight": module.tensors["weight"],
        "weight_scale": scale.expand(module.channels, -1).contiguous(),
    }


# integers in words of 32 bits --------------------------------------------------------------------


def _packed_format(module: Module) -> Format:
    """compressed-tensors' `pack-quantized`: [N, K·bits/32] words, the first column lowest."""
    scales = "weight_scale"
    bits = _bits(module, "weight_packed", (module.channels, module.columns), dim=1)
    shape = module.shape(scales)
    if len(shape) != 2 or shape[0] != module.channels:
        raise module.refuse(
            f"{scales} has shape {shape}, which is no scale of {module.channels} output channels",
            "use a checkpoint with a scale of each output channel or group",
        )
    words = -(-module.channels * bits // 32)
    module.check_shape("weight_zero_point", (words, shape[1]), shape)
    module.check_shape("weight_g_idx", (module.columns,))
    zeros = bits == 4 and "weight_zero_point" in module.tensors
    return Format(
        INTEGERS[bits], module.group(shape[1], scales), module.tensors[scales].dtype, zeros
    )


def _read_packed(module: Module) -> dict[str, Tensor]:
    scale, zero = module.tensors["weight_scale"], module.tensors.get("weight_zero_point")
    bits = _bits(module, "weight_packed", (module.channels, module.columns), dim=1)
    if zero is not None and zero.dtype == torch.int32:  # words along the output channels
        zero = _unpacked(zero.T.contiguous(), bits)[:, : module.channels].T
    elif zero is not None:
        zero = (zero.short() + (1 << bits - 1)).to(torch.uint8)
    values = _rows(module.tensors["weight_packed"])[:, : module.columns * bits // 8]
    return _in_our_format(module, bits, values, scale, zero, "weight_g_idx")


def _words_format(module: Module) -> Format:
    """GPTQ, words along the columns: [K·bits/32, N]; AWQ, along the channels: [K, N·bits/32]."""
    scales = "scales"
    if len(shape := module.shape(scales)) != 2 or shape[1] != module.channels:
        raise module.refuse(
            f"{scales} has shape {shape}, which is no scale of {module.channels} output channels",
            "use a checkpoint with a scale of each output channel or group",
        )
    bits = _bits(
        module, "qweight", (module.columns, module.channels), dim=1 if _is_awq(module) else 0
    )
    if bits == 8 and _is_awq(module):
        raise module.refuse("is AWQ in 8 bits", "use a checkpoint in 4 bits, or another format")
    module.check_shape("qzeros", (shape[0], -(-module.channels * bits // 32)))
    module.check_shape("g_idx", (module.columns,))
    group, dtype = module.group(shape[0], scales), module.tensors[scales].dtype
    return Format(INTEGERS[bits], group, dtype, zeros=bits == 4)


def _is_awq(module: Module) -> bool:
    return module.shape("qweight")[:1] == (module.columns,)


def _read_words(module: Module) -> dict[str, Tensor]:
    scale, words = module.tensors["scales"].T, module.tensors["qweight"]
    if _is_awq(module):
        bits, weight = 4, _read_awq(words)
        zero = _unpacked(module.tensors["qzeros"], bits).unflatten(1, (-1, 8))[..., AWQ_ORDER]
        zero = zero.flatten(1).T
    else:
        bits = _bits(module, "qweight", (module.columns, module.channels), dim=0)
        weight = _rows(words.T)
        zero = _unpacked(module.tensors["qzeros"], bits).T + module.less & (1 << bits) - 1
    return _in_our_format(module, bits, weight, scale, zero, "g_idx")


def _read_awq(words: Tensor) -> Tensor:
    """Shapes: words [K, N/8] int32, returns [N, K/2] uint8, the lower nibble first."""
    even, odd = _rows(words).unflatten(0, (-1, 2)).unbind(1)  # [K/2, N/2]
    lower, upper = even & 15 | odd << 4, even >> 4 | odd & 0xF0
    nibbles_of_words = torch.stack([lower, upper], -1).unflatten(1, (-1, 4)).flatten(-2)
    return nibbles_of_words[..., AWQ_ORDER].flatten(1).T  # [K/2, N/8, 8]


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
        f"{module.channels} output channels and {module.columns} columns",
        "use a checkpoint in 4 or 8 bits",
    )


def _rows(words: Tensor) -> Tensor:
    """Shapes: words [R, W] int32, returns [R, 4 W] uint8, the lowest first."""
    R, W = words.shape
    return words.contiguous().flatten().view(torch.uint8).view(R, 4 * W)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Shapes: words [R, W] int32, returns [R, W·32/bits] uint8, the lowest bits first."""
    return _rows(words) if bits == 8 else nibbles(_rows(words))


def _in_our_format(
    module: Module, bits: int, values: Tensor, scale: Tensor, zero: Tensor | None, order: str
) -> dict[str, Tensor]:
    """Shapes: values [N, K·bits/8] and zero [N, G] unsigned, scale [N, G]."""
    _check_order(module, order, scale.shape[1])
    found = {"weight": values.contiguous(), "weight_scale": scale.contiguous()}
    if bits == 8:
        if zero is not None and (zero != 128).any():
            raise module.refuse(
                "8-bit values have zero points other than 128", "use symmetric 8-bit weights"
            )
        found["weight"] = (found["weight"] ^ 128).view(torch.int8)
    elif zero is not None:
        found["weight_zero"] = zero.contiguous()
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
        ("weight", "weight_scale"), ("input_scale",), _scaled_format, _read_scaled
    ),
    ("weight", torch.int8): Scheme(
        ("weight", "weight_scale"),
        ("input_scale", "weight_zero_point"),
        _scaled_format,
        _read_scaled,
    ),
    ("weight_packed", torch.int32): Scheme(
        ("weight_packed", "weight_scale", "weight_shape"),
        ("weight_zero_point", "weight_g_idx"),
        _packed_format,
        _read_packed,
    ),
    ("qweight", torch.int32): Scheme(
        ("qweight", "qzeros", "scales"), ("g_idx",), _words_format, _read_words
    ),
}
IN_BLOCKS = Scheme(("weight", "weight_scale_inv"), ("input_scale",), _block_format, _read_scaled)


def scheme(tensors: Tensors) -> Scheme | None:
    """The scheme of a module with these tensors, by names and dtypes; None: unknown."""
    for name, tensor in tensors.items():
        if (name, tensor.dtype) in fp4.VALUES:
            return fp4.scheme(tensors)
        if found := SCHEMES.get((name, tensor.dtype)):
            is_fp8 = tensor.dtype == torch.float8_e4m3fn
            return IN_BLOCKS if is_fp8 and "weight_scale_inv" in tensors else found
    return None
