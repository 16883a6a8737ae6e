"""Parameters become packed weights as soon as a layer, or one of its experts, is loaded.

An engine would pack after loading all layers; then both copies of all weights might not fit.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qwen3next_plugin.kernels.linear import Stack
from qwen3next_plugin.model.checkpoint.mapped import drop, give_back_freed
from qwen3next_plugin.model.quantisation.format import BF16, Format
from qwen3next_plugin.model.quantisation.packed import Packed, pack

BF16_EXPERTS: Mapping[str, Format] = {"w13": BF16, "w2": BF16}
EXPERTS_WEIGHTS = ("w13_weight", "w2_weight")
OF_EXPERTS = ".mlp.experts."  # in an expert's name, between its layer's name and its number


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
