"""Weights as the kernels read them, packed once they are loaded."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.draft_head import quantise_rows
from qwen3next_plugin.kernels.linear import (
    Weight,
    linear,
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
)
from qwen3next_plugin.kernels.linear.weight import TILE
from qwen3next_plugin.model.checkpoint.mapped import give_back_freed
from qwen3next_plugin.model.quantised import Format, nibbles


class Packed(nn.Module):
    """A packed weight [N, K], or of experts [E, N, K]; its tensors are buffers."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.format, self.shape, self.group = weight.format, weight.shape, weight.group
        for name in ("packed", "scale", "zero"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self._weight = weight

    @property
    def weight(self) -> Weight:
        """The bundle that kernels take. In a trace it is made of buffers, whose sizes are fixed."""
        return self._bundle() if torch.compiler.is_compiling() else self._weight

    def _bundle(self) -> Weight:
        return Weight(
            format=self.format,
            shape=self.shape,
            group=self.group,
            packed=self.packed,
            scale=self.scale,
            zero=self.zero,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Change all tensors, as `to` does."""
        super()._apply(fn, recurse)
        self._weight = self._bundle()
        return self

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Shapes: x [..., K], bias [N], returns [..., N]."""
        if x.dim() == 2:  # as in nearly every layer; views take a microsecond each
            out = linear(x, self.weight)
        else:
            out = linear(x.reshape(-1, x.shape[-1]), self.weight).unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


def packs_plain() -> bool:
    """Whether weights in bf16 are packed for our kernels.

    They are where the processor has AMX, with which these are the fastest, and where a token's bits
    must not depend on its batch. The choice is the machine's, not QWEN3NEXT_ISA's: vLLM keeps
    compiled graphs, which have it in them.
    """
    return env.kernels() != "reference" and (env.batch_invariant() or "amx" in native.levels())


def check_invariance(dtype: torch.dtype, *, on_cpu: bool) -> None:
    """Refuse QWEN3NEXT_BATCH_INVARIANT where some product is not by our kernels.

    Raises: ConfigError, naming what is in the way and the fix.
    """
    variable = "QWEN3NEXT_BATCH_INVARIANT=1"
    if not on_cpu:
        raise ConfigError(f"{variable}: only CPU kernels promise it; unset it")
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"{variable}: in {dtype}, projections are oneDNN's, which depend on the batch; add "
            f"--dtype bfloat16"
        )
    if env.kernels() == "reference":
        raise ConfigError(f"{variable}: the reference does not promise it; unset QWEN3NEXT_KERNELS")


def pack_as_int8(weight: Tensor) -> Weight:
    """Quantise the rows of a weight [N, K] to int8, and pack them."""
    values, scale = quantise_rows(weight)
    return pack_int8(values, scale[:, None])


def pack_plain(layer: nn.Module, *, as_int8: bool = False) -> Packed:
    """Pack a layer's weight [N, K] in bf16 or int8, and drop the plain one."""
    assert isinstance(layer.weight, Tensor)
    weight = layer.weight.data
    packed = Packed(pack_as_int8(weight) if as_int8 else pack_bf16(weight))
    drop_plain(layer)
    return packed


def drop_plain(layer: nn.Module) -> None:
    """Leave an empty weight, which hosts look at, in place of one that is packed."""
    assert isinstance(layer.weight, Tensor)
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    give_back_freed()


def packs_head(dtype: torch.dtype) -> bool:
    """Whether an output head of this dtype is packed for our kernels, by `pack_head`."""
    return env.quantise() is not None or (dtype == torch.bfloat16 and packs_plain())


def pack_head(weight: Tensor) -> Packed:
    """Pack an output head, in int8 where QWEN3NEXT_QUANTISE asks for int8 or int4.

    Shapes: weight [N, K], which stays as it is.
    """
    return Packed(pack_bf16(weight) if env.quantise() is None else pack_as_int8(weight))


def pack(tensors: Mapping[str, Tensor], form: Format, *, as_int8: bool = False) -> Packed:
    """Pack tensors of a format, those in bf16 as int8 if asked.

    Shapes: those of `Format.tensors(N, K)`, or of experts with a leading E
    """
    if tensors["weight"].dim() == 2:
        return Packed(_pack(tensors, form, as_int8))
    E = len(tensors["weight"])
    whole: Weight | None = None
    for e in range(E):  # one by one: packing takes several times the memory of what is packed
        one = _pack({name: tensor[e] for name, tensor in tensors.items()}, form, as_int8)
        if whole is None:
            whole = Weight(
                format=one.format,
                shape=(E, *one.shape),
                group=one.group,
                packed=one.packed.new_empty(E, *one.packed.shape),
                scale=one.scale.new_empty(E, *one.scale.shape),
                zero=None if one.zero is None else one.zero.new_empty(E, *one.zero.shape),
            )
        for name in ("packed", "scale", "zero"):
            if (tensor := getattr(one, name)) is not None:
                getattr(whole, name)[e].copy_(tensor)
    assert whole is not None, "no experts"
    return Packed(whole)


def parameters(form: Format, rows: int, columns: int, *experts: int) -> dict[str, nn.Parameter]:
    """What a host loads a weight [N, K] into, or [E, N, K] of experts, before it is packed."""
    return {
        name: nn.Parameter(torch.empty(*experts, *shape, dtype=dtype), requires_grad=False)
        for name, (shape, dtype) in form.tensors(rows, columns).items()
    }


def pack_parameters(
    layer: nn.Module, form: Format, prefix: str = "", *, as_int8: bool = False
) -> Packed:
    """Pack a layer's parameters, those in bf16 as int8 if asked, and drop them."""
    tensors = {name: getattr(layer, prefix + name).data for name in form.names}
    for name in tensors:
        delattr(layer, prefix + name)
    packed = pack(tensors, form, as_int8=as_int8)
    tensors.clear()
    give_back_freed()
    return packed


def check_split(module: str, form: Format, columns: int, of_rank: int) -> None:
    """Refuse ranks that would share a group of columns.

    Raises: ConfigError, naming the module and the fix.
    """
    if form.group and columns != of_rank and of_rank % form.group:
        raise ConfigError(
            f"{module}: a rank's {of_rank} of {columns} columns are no multiple of {form.group}, "
            f"which share a scale; use fewer tensor-parallel ranks"
        )


def check_experts(module: str, form: Format, inner: int, of_rank: int) -> None:
    """Refuse experts [D, I] that the kernel cannot take, of a rank or of all.

    Raises: ConfigError, naming the module and the fix.
    """
    check_split(module, form, inner, of_rank)
    if of_rank % TILE:
        raise ConfigError(
            f"{module}: packed experts have {of_rank} inner features on a rank, no multiple of "
            f"{TILE}; use fewer tensor-parallel ranks, or a checkpoint that is not quantised"
        )


def _pack(tensors: Mapping[str, Tensor], form: Format, as_int8: bool) -> Weight:
    weight = tensors["weight"]
    if form.name == "bf16":
        return pack_as_int8(weight) if as_int8 else pack_bf16(weight)
    scale = tensors["weight_scale"]
    if form.name == "int4":
        return pack_int4(nibbles(weight), scale, tensors.get("weight_zero"))
    return (pack_int8 if form.name == "int8" else pack_fp8)(weight, scale)
