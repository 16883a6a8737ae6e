"""Packed weights: which are packed, when, and the bytes that our kernels read.

Parameters become packed weights as soon as a layer, or one of its experts, is loaded. An engine
would pack after loading all layers; then both copies of all weights might not fit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.draft_head import quantise_channels
from qwen3next_plugin.kernels.linear import (
    PackedWeight,
    Stack,
    linear,
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_mxfp4,
    pack_nvfp4,
    stack,
)
from qwen3next_plugin.model.checkpoint.mapped import drop, give_back_freed
from qwen3next_plugin.model.quantisation.format import BF16, CHANNEL_SCALE, Format
from qwen3next_plugin.model.quantisation.modules import Formats

BF16_EXPERTS: Mapping[str, Format] = {"w13": BF16, "w2": BF16}
EXPERTS_WEIGHTS = ("w13_weight", "w2_weight")
OF_EXPERTS = ".mlp.experts."  # in an expert's name, between its layer's name and its number


class Packed(nn.Module):
    """A packed weight [N, K], or of experts [E, N, K]; its tensors are buffers."""

    packed: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, weight: PackedWeight) -> None:
        super().__init__()
        self.encoding, self.shape, self.group = weight.encoding, weight.shape, weight.group
        for name in ("packed", "scale", "zero"):
            self.register_buffer(name, getattr(weight, name), persistent=False)
        self._weight = weight

    @property
    def weight(self) -> PackedWeight:
        """The bundle that kernels take. In a trace it is made of buffers, whose sizes are fixed."""
        return self._bundle() if torch.compiler.is_compiling() else self._weight

    def _bundle(self) -> PackedWeight:
        return PackedWeight(
            encoding=self.encoding,
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

    def forward(
        self, x: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        """Shapes: x [..., K], bias [N], returns [..., N] of x's dtype, or fp32 if asked."""
        if x.dim() == 2:  # as in nearly every layer; views take a microsecond each
            out = linear(x, self.weight, out_dtype=out_dtype)
        else:
            flat = linear(x.reshape(-1, x.shape[-1]), self.weight, out_dtype=out_dtype)
            out = flat.unflatten(0, x.shape[:-1])
        return out if bias is None else out + bias


def packs_plain(dtype: torch.dtype) -> bool:
    """Whether weights of this dtype, if they are not quantised, are packed for our kernels.

    bf16 weights are, on an x86 processor with bf16 instructions, where our kernels are the fastest,
    and if a token's bits must not depend on its batch. The processor decides, not QWEN3NEXT_ISA,
    because vLLM's cached graphs contain the choice.
    """
    if dtype != torch.bfloat16 or env.kernels() == "reference":
        return False
    return env.batch_invariant() or "avx512bf16" in native.levels()


def check_invariance(dtype: torch.dtype, *, on_cpu: bool) -> None:
    """Refuse QWEN3NEXT_BATCH_INVARIANT unless our kernels compute every product.

    Raises: ConfigError, naming the cause and the fix.
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


def pack(tensors: Mapping[str, Tensor], form: Format, *, as_int8: bool = False) -> Packed:
    """Pack tensors of a format, those in bf16 as int8 if asked.

    Shapes: those of `Format.tensors(N, K)`, or of experts with a leading E
    """
    weight = tensors["weight"]
    if form.encoding == "bf16":
        return Packed(_as_int8(weight) if as_int8 else pack_bf16(weight))
    scale = tensors["weight_scale"]
    if form.encoding == "int4":
        return Packed(pack_int4(weight, scale, tensors.get("weight_zero")))
    if form.encoding == "nvfp4":
        return Packed(pack_nvfp4(weight, scale, tensors[CHANNEL_SCALE]))
    if form.encoding == "mxfp4":
        return Packed(pack_mxfp4(weight, scale))
    return Packed((pack_int8 if form.encoding == "int8" else pack_fp8)(weight, scale))


def _as_int8(weight: Tensor) -> PackedWeight:
    """Quantise experts one by one, because it takes several times the memory of its input."""
    if weight.dim() == 3:
        return stack(map(_as_int8, weight), len(weight))
    values, scale = quantise_channels(weight)
    return pack_int8(values, scale[:, None])


def pack_plain(weight: Tensor, *, as_int8: bool = False) -> Packed:
    """Pack a weight that is not quantised. Shapes: weight [N, K], which stays as it is."""
    return pack({"weight": weight}, BF16, as_int8=as_int8)


def drop_plain(layer: nn.Module) -> None:
    """Replace a packed layer's plain weight by an empty one, which hosts may still read."""
    assert isinstance(layer.weight, Tensor)
    layer.weight = nn.Parameter(layer.weight.new_empty(0), requires_grad=False)
    give_back_freed()


def plain_as_int8(formats: Formats | None) -> bool:
    """Whether the output head and stream mixers, which have no format, are packed as int8.

    True if other weights are quantised, unless QWEN3NEXT_HEAD=plain.
    """
    return formats is not None and env.head() == "auto"


def packs(dtype: torch.dtype, *, as_int8: bool) -> bool:
    """Whether a weight of this dtype that has no format is packed for our kernels."""
    return as_int8 or packs_plain(dtype)


class Packing:
    """Marks a method that packs a layer's weights, also before the engine asks for it.

    Its `process_weights_after_loading` leaves packed weights as they are.
    """


class PackingExperts(Packing):
    """Marks a method of experts, which may be packed one by one."""

    formats: Mapping[str, Format]
    as_int8 = False  # pack what is in bf16 as int8
    stacks: dict[str, Stack] | None = None  # of experts that are packed already

    def may_pack(self, layer: Any) -> bool:
        """Whether experts may be packed early and one by one; this rank must have all of them."""
        raise NotImplementedError

    def pack_expert(self, layer: Any, index: int) -> None:
        """Pack an expert whose tensors are loaded, and give back the memory of its parameters.

        Only for an MTP layer, whose copy in bf16 is large beside all else, because one by one
        takes 1.5 times as long. Not where an engine keeps the tensors until it has the whole
        layer, as vLLM's reload does.
        """
        w2 = getattr(layer, "w2_weight", None)
        if not self.as_int8 or w2 is None or w2.is_meta or not self.may_pack(layer):
            return
        if self.stacks is None:
            self.stacks = {which: Stack(len(w2)) for which in self.formats}
        for which, form in self.formats.items():
            tensors = {name: getattr(layer, f"{which}_{name}").data[index] for name in form.names}
            self.stacks[which].put(index, pack(tensors, form, as_int8=self.as_int8).weight)
            drop(tensors["weight"])

    def pack_experts(self, layer: Any) -> None:
        """Pack all experts, if they are not packed one by one, and drop their parameters."""
        for which, form in self.formats.items():
            if self.stacks is None:
                packed = pack_parameters(layer, form, f"{which}_", as_int8=self.as_int8)
            else:
                packed = Packed(self.stacks[which].whole())
                for name in form.names:
                    delattr(layer, f"{which}_{name}")
            setattr(layer, f"{which}_packed", packed)
        self.stacks = None


class Packer:
    """Packs a model's decoder layers, and experts of them, as soon as their tensors are loaded.

    Experts are loaded into the memory of those that were packed before them. New memory would
    fault on each page, and Linux might first have to make room.
    """

    def __init__(
        self, model: nn.Module, name_in_model: Callable[[str], str] = lambda name: name
    ) -> None:
        self.model, self.name_in_model = model, name_in_model
        self.free: dict[tuple[torch.Size, torch.dtype], Tensor] = {}

    def begin(self, name: str) -> None:
        """Called before the first tensor of a layer or expert, with its name in the checkpoint."""
        if OF_EXPERTS in name:
            return
        for layer in self._packing(name, PackingExperts):
            for parameter in layer.parameters(recurse=False):
                found = self.free.pop((parameter.shape, parameter.dtype), None)
                if found is not None:
                    parameter.data = found

    def end(self, name: str) -> None:
        """Called once all tensors of a layer, or of an expert, are loaded."""
        within, _, expert = name.partition(OF_EXPERTS)
        if expert:
            for layer in self._packing(within, PackingExperts):
                layer.quant_method.pack_expert(layer, int(expert))
            return
        for layer in self._packing(name, Packing):
            loaded = {which: getattr(layer, which, None) for which in EXPERTS_WEIGHTS}
            layer.quant_method.process_weights_after_loading(layer)
            for which, weight in loaded.items():
                if weight is not None and not weight.is_meta and not hasattr(layer, which):
                    self.free[weight.shape, weight.dtype] = weight.data
        experts = self._packing("", PackingExperts)
        if not any(hasattr(layer, which) for layer in experts for which in EXPERTS_WEIGHTS):
            self.free.clear()  # before what else is loaded

    def _packing(self, name: str, kind: type[Packing]) -> Iterator[Any]:
        """The layers of this kind within a module."""
        for layer in self.model.get_submodule(self.name_in_model(name)).modules():
            if isinstance(getattr(layer, "quant_method", None), kind):
                yield layer


def pack_parameters(layer: Any, form: Format, prefix: str = "", *, as_int8: bool = False) -> Packed:
    """Pack a layer's parameters, and drop them."""
    tensors = {name: getattr(layer, prefix + name).data for name in form.names}
    for name in tensors:
        delattr(layer, prefix + name)
    packed = pack(tensors, form, as_int8=as_int8)
    tensors.clear()
    give_back_freed()
    return packed
