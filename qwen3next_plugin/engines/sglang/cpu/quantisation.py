"""Quantised checkpoints on a CPU, and other packed weights; SGLang packs for AMX only.

Each layer has the format that the checkpoint's files say. Where there is none, bf16 is packed for
our kernels or oneDNN, which repacks a plain weight at each product. That takes up to half of a
decode step's time. Weights are packed once, at load, and the plain copy is dropped. fp32 weights,
and what SGLang packed for AMX, stay as they are.
"""

from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import (
    LinearMethodBase,
    QuantizationConfig,
    QuantizeMethodBase,
)
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils import use_intel_amx_backend
from torch import nn

from qwen3next_plugin import env
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.sglang.config import quantization_config
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.cpu.experts import NativeExperts, PackedExperts
from qwen3next_plugin.engines.sglang.names import QUANTISATION
from qwen3next_plugin.kernels.linear import PackedWeight
from qwen3next_plugin.model.kinds import model_kinds
from qwen3next_plugin.model.quantisation.files import LEAVES_PLAIN, read_formats
from qwen3next_plugin.model.quantisation.layers import (
    HeadMethod,
    LinearMethod,
    PlainMethod,
    each_layer,
)
from qwen3next_plugin.model.quantisation.modules import ByFiles, Formats
from qwen3next_plugin.model.quantisation.packing import (
    Packed,
    drop_plain,
    pack_plain,
    packs,
    packs_plain,
    plain_as_int8,
)
from qwen3next_plugin.model.quantisation.stacked import HEAD_MODULE

TOKENS = 1  # the layout is chosen for one token; measured, it is as fast for more


class Quantisation(ByFiles, QuantizationConfig):
    """Every quantised checkpoint of our models, on a CPU."""

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__()
        self.formats = read_formats(folder, hf_config, quantization_config(hf_config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        found = self.formats.of(prefix)
        if isinstance(layer, FusedMoE):
            inner = layer.intermediate_size_per_partition * layer.moe_tp_size
            return PackedExperts(prefix, found, inner) if found else NativeExperts()
        if isinstance(layer, LinearBase):
            return PackedLinear(prefix, found["weight"]) if found else UnquantizedLinearMethod()
        return None

    # What SGLang asks of a quantisation, besides what both engines do.

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Quantisation":
        raise NotImplementedError("a checkpoint's files say how it is quantised")

    def get_name(self) -> str:
        return QUANTISATION

    def get_scaled_act_names(self) -> list[str]:
        return []


def goes_by_files(config: QuantizationConfig | None) -> bool:
    """Whether a quantisation has read a checkpoint's files."""
    return isinstance(config, ByFiles) or getattr(config, LEAVES_PLAIN, False)


@override(
    "sglang.srt.layers.linear.LinearBase.quant_method",
    reason="SGLang packs projections for AMX only",
    remove_when="SGLang packs them on any CPU",
)
def use_packing(
    model: nn.Module,
    formats: Formats | None,
    head: Any = None,  # a module
    *,
    head_in_fp32: bool = False,
    drafting: nn.Module | None = None,
) -> None:
    """On a CPU, make SGLang pack what is not quantised of a model, head included, after loading."""
    if not without_gpu():
        return
    for kind in model_kinds():
        kind.use_packing(model, formats, UnquantizedLinearMethod, drafting=drafting is not None)
    for layer, as_int8 in each_layer(model, drafting):
        method = getattr(layer, "quant_method", None)
        if type(method) is UnquantizedLinearMethod:
            _use(PackedProjection(as_int8=as_int8), layer)
        elif type(method) is UnquantizedEmbeddingMethod and layer is head:
            # SGLang has the other product in fp32, for methods whose names it knows.
            # A head in fp32 is asked for its precision.
            in_files = formats is not None and HEAD_MODULE in formats.packed_plain
            kept = head_in_fp32 and env.quantise() is None and not in_files
            as_int8 = plain_as_int8(formats) and not kept
            if packs(layer.weight.dtype, as_int8=as_int8) or not head_in_fp32:
                _use(PackedHead(as_int8=as_int8), layer)
        elif isinstance(method, UnquantizedFusedMoEMethod):
            method.as_int8 = as_int8


def _use(method: "PackedProjection | PackedHead", layer: Any) -> None:
    layer.quant_method, layer.packed = method, None


class PackedLinear(LinearMethod, LinearMethodBase):
    """A projection of a quantised checkpoint."""


class OneDnn(nn.Module):
    """A weight in oneDNN's layout."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TOKENS)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Shapes: x [T, K], bias [N], returns [T, N]."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, "none", [], "")


def make_product(weight: torch.Tensor, *, as_int8: bool = False) -> Packed | OneDnn:
    """By our kernels in bf16, or int8 if asked, else by oneDNN. Shapes: weight [N, K] bf16."""
    return pack_plain(weight, as_int8=as_int8) if packs_plain(weight.dtype) else OneDnn(weight)


def _is_plain(layer: Any) -> bool:
    """Whether a layer is not packed yet."""
    on_cpu = layer.weight.device.type == "cpu"
    return layer.packed is None and on_cpu and not use_intel_amx_backend(layer)


class PackedProjection(PlainMethod, UnquantizedLinearMethod):
    """SGLang's unquantised projection."""

    def process_weights_after_loading(self, layer: Any) -> None:
        if not _is_plain(layer):
            return
        UnquantizedLinearMethod.process_weights_after_loading(self, layer)
        if _is_plain(layer) and layer.weight.dtype == torch.bfloat16:
            layer.packed = make_product(layer.weight.data, as_int8=self.as_int8)
            drop_plain(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if layer.packed is None:
            return super().apply(layer, x, bias)
        return layer.packed(x, bias)


class PackedHead(HeadMethod, UnquantizedEmbeddingMethod):
    """SGLang's unquantised head; a plain copy is dropped once drafts have been read from it."""

    def __init__(self, *, as_int8: bool) -> None:
        super().__init__()
        self.as_int8 = as_int8

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        if _is_plain(layer):
            weight = layer.weight.data
            if packs(weight.dtype, as_int8=self.as_int8):
                layer.packed = pack_plain(weight, as_int8=self.as_int8)
            elif weight.dtype == torch.bfloat16:
                layer.packed = OneDnn(weight)
        if layer.packed is None or _is_tied(layer):
            return
        if isinstance(layer.packed, Packed) or not get_server_args().speculative_algorithm:
            drop_plain(layer)


def _is_tied(head: Any) -> bool:
    """Whether the head is the embedding, the same module."""
    return not isinstance(head, ParallelLMHead)


def head_for_drafts(head: Any) -> tuple[torch.Tensor | PackedWeight, bool]:
    """The head that drafts are read from, and whether it stays; if not, drop the plain head."""
    packed = getattr(head, "packed", None)
    if isinstance(packed, Packed):
        return packed.weight, True
    return head.weight.data, packed is None or _is_tied(head)


class PackedLogitsProcessor(LogitsProcessor):
    """SGLang's, with a product that uses the packed weight."""

    @override(
        "sglang.srt.layers.logits_processor.LogitsProcessor._compute_lm_head",
        reason="SGLang multiplies by the plain weight, which oneDNN repacks each time",
        remove_when="SGLang packs a head on any CPU",
    )
    def _compute_lm_head(
        self,
        hidden_states: torch.Tensor,
        lm_head: Any,
        embedding_bias: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Shapes: hidden_states [N, D], returns [N, vocab of this rank, padded]."""
        if (packed := getattr(lm_head, "packed", None)) is None:
            return super()._compute_lm_head(hidden_states, lm_head, embedding_bias, out=out)
        if not isinstance(packed, Packed):
            return packed(hidden_states)
        x = hidden_states.float() if self.use_fp32_lm_head else hidden_states
        return packed(x, out_dtype=torch.float32)
