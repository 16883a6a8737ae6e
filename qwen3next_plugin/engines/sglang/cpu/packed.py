"""Quantised layers on a CPU: SGLang loads and shards their rows, our kernels multiply."""

from collections.abc import Mapping
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import CombineInput, StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization.base_config import (
    FusedMoEMethodBase,
    LinearMethodBase,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import set_weight_attrs
from torch import nn

from qwen3next_plugin.engines.sglang.cpu.experts import NativeExperts
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.model.packed import (
    check_experts,
    check_split,
    pack_parameters,
    parameters,
)
from qwen3next_plugin.model.quantised import Format


def method(
    layer: nn.Module, prefix: str, found: Mapping[str, Format] | None
) -> QuantizeMethodBase | None:
    """How SGLang runs a layer whose tensors have these formats, None: no format."""
    if isinstance(layer, FusedMoE):
        return PackedExperts(prefix, found) if found else NativeExperts()
    if isinstance(layer, LinearBase):
        return PackedLinear(prefix, found["weight"]) if found else UnquantizedLinearMethod()
    return None


class PackedLinear(LinearMethodBase):
    """A projection of one format."""

    def __init__(self, prefix: str, form: Format) -> None:
        self.prefix, self.format = prefix, form

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_split(self.prefix, self.format, input_size, input_size_per_partition)
        rows = sum(output_partition_sizes)
        made = parameters(self.format, rows, input_size_per_partition)
        for name, parameter in made.items():
            by_column = name == "weight" or self.format.group > 0
            dims = {"output_dim": 0} | ({"input_dim": 1} if by_column else {})
            set_weight_attrs(parameter, dims | extra_weight_attrs)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "packed"):  # SGLang may call this twice
            layer.packed = pack_parameters(layer, self.format)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.packed(x, bias)


class PackedExperts(FusedMoEMethodBase):
    """Experts, of one format each for `w13` and `w2`."""

    def __init__(self, prefix: str, found: Mapping[str, Format]) -> None:
        super().__init__()
        self.prefix, self.formats = prefix, found

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        D, width = hidden_size, intermediate_size_per_partition
        check_experts(self.prefix, self.formats["w2"], width * layer.moe_tp_size, width)
        for which, (rows, columns) in {"w13": (2 * width, D), "w2": (D, width)}.items():
            form = self.formats[which]
            for name, parameter in parameters(form, rows, columns, num_experts).items():
                by_column = {"quant_method": "group" if form.group else "channel"}
                set_weight_attrs(parameter, extra_weight_attrs | by_column)
                layer.register_parameter(f"{which}_{name}", parameter)

    def create_moe_runner(self, layer: nn.Module, moe_runner_config: Any) -> None:
        """None: our kernel is called directly."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "w2_packed"):  # SGLang may call this twice
            for which, form in self.formats.items():
                setattr(layer, f"{which}_packed", pack_parameters(layer, form, f"{which}_"))

    def apply(self, layer: Any, dispatch_output: StandardDispatchOutput) -> CombineInput:
        """Shapes: hidden_states [T, D], returns [T, D]."""
        topk = dispatch_output.topk_output
        return StandardCombineInput(
            hidden_states=fused_moe(
                x=dispatch_output.hidden_states,
                w13=layer.w13_packed.weight,
                w2=layer.w2_packed.weight,
                topk_weights=topk.topk_weights.float(),
                topk_ids=topk.topk_ids.int(),
            )
        )
