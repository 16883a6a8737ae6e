"""Packed layers on a CPU: vLLM loads and shards their rows, our kernels multiply."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.model.packed import (
    check_experts,
    check_split,
    pack_parameters,
    parameters,
)
from qwen3next_plugin.model.quantised import Format


def method(layer: nn.Module, found: Mapping[str, Format] | None) -> QuantizeMethodBase | None:
    """How vLLM runs a layer whose tensors have these formats, None: no format."""
    if isinstance(layer, RoutedExperts):
        return PackedExperts(layer.moe_config, found) if found else None
    if isinstance(layer, LinearBase):
        return PackedLinear(found["weight"]) if found else UnquantizedLinearMethod()
    return None


def on_this_rank(
    topk_weights: torch.Tensor, topk_ids: torch.Tensor, expert_map: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rank's own index of each expert; the weight of one that it has not is zero.

    Shapes: topk_* [T, k], expert_map [experts of the model], -1 where the rank has none
    """
    if expert_map is None:
        return topk_weights, topk_ids
    topk_ids = expert_map[topk_ids.long()]
    return topk_weights.masked_fill(topk_ids < 0, 0), topk_ids.clamp(min=0)


class PackedLinear(LinearMethodBase):
    """A projection of one format."""

    def __init__(self, form: Format) -> None:
        self.format = form

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        check_split(layer.prefix, self.format, input_size, input_size_per_partition)
        rows = sum(output_partition_sizes)
        made = parameters(self.format, rows, input_size_per_partition)
        for name, parameter in made.items():
            by_column = name == "weight" or self.format.group > 0
            dims = {"output_dim": 0} | ({"input_dim": 1} if by_column else {})
            set_weight_attrs(parameter, dims | extra_weight_attrs)
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.packed = pack_parameters(layer, self.format)

    def apply(
        self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return layer.packed(x, bias)


class PackedExperts(FusedMoEMethodBase):
    """Experts, of one format each for `w13` and `w2`."""

    def __init__(self, moe: FusedMoEConfig, found: Mapping[str, Format]) -> None:
        super().__init__(moe)
        self.formats = found
        self.drafts = False  # a drafter's: what is in bf16 is packed as int8

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        D, width = hidden_size, intermediate_size_per_partition
        inner = layer.moe_config.intermediate_size
        check_experts(layer.layer_name, self.formats["w2"], inner, width)
        for which, (rows, columns) in {"w13": (2 * width, D), "w2": (D, width)}.items():
            form = self.formats[which]
            for name, parameter in parameters(form, rows, columns, num_experts).items():
                by_column = {"quant_method": "group" if form.group else "channel"}
                set_weight_attrs(parameter, by_column | extra_weight_attrs)
                layer.register_parameter(f"{which}_{name}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        for which, form in self.formats.items():
            packed = pack_parameters(layer, form, f"{which}_", as_int8=self.drafts)
            setattr(layer, f"{which}_packed", packed)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """None: our kernel asks vLLM for nothing."""

    def apply(
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """Shapes: x [T, D], topk_* [T, k], returns [T, D]."""
        topk_weights, topk_ids = on_this_rank(topk_weights, topk_ids, layer.expert_map)
        return fused_moe(
            x=x,
            w13=layer.w13_packed.weight,
            w2=layer.w2_packed.weight,
            topk_weights=topk_weights.float(),
            topk_ids=topk_ids.int(),
        )
