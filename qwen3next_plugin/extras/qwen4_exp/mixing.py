"""Stream mixers: the large weights of hyper-connections, packed as the output head is."""

from typing import Any

from torch import Tensor, nn

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.kernels.hyper_connection import takes_packed
from qwen3next_plugin.kernels.linear import PackedWeight
from qwen3next_plugin.model.linear_attention import Weight
from qwen3next_plugin.model.quantisation.layers import Attaching, PlainMethod, Ranks, hold
from qwen3next_plugin.model.quantisation.modules import Formats
from qwen3next_plugin.model.quantisation.packing import Packed, drop_plain, packs, plain_as_int8


class MixingWeight(Weight):
    """A weight that no engine's layer holds; packed once it is loaded."""

    quant_method: Any

    def __init__(self, name: str, *shape: int, config: Qwen4ExpConfig) -> None:
        super().__init__(*shape)
        self.name = name
        self.may_be_packed = takes_packed(config.hidden_size)
        self.packed: Packed | None = None

    @property
    def value(self) -> Tensor | PackedWeight:
        """What the kernel takes."""
        return self.weight if self.packed is None else self.packed.weight


class MixingMethod(PlainMethod, Attaching):
    """The method of the stream mixer `module`, which the files may have packed."""

    def __init__(self, module: str, *, as_int8: bool) -> None:
        super().__init__(as_int8=as_int8)
        self.module = module

    def attach(self, layer: Any, name: str, weight: PackedWeight, ranks: Ranks) -> None:
        hold(layer, "packed", weight)  # whole: ranks do not divide streams
        drop_plain(layer)


def use_packing(
    model: nn.Module, formats: Formats | None, base: type, *, drafting: bool = False
) -> None:
    """Have a model's stream mixers packed, where their kernel takes them so.

    As int8 if `plain_as_int8`, and in a model that drafts: drafting is bound by reading weights,
    and a wrong draft costs only speed. Else in bf16.

    Args: base: the engine's class of methods, by which it knows what to process.
    """
    as_int8 = plain_as_int8(formats)
    method = type("PackedMixing", (MixingMethod, base), {})
    for module in model.modules():
        if not isinstance(module, MixingWeight) or not module.may_be_packed:
            continue
        if packs(module.weight.dtype, as_int8=as_int8):
            module.quant_method = method(module.name, as_int8=as_int8 or drafting)
