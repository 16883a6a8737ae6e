"""Quantised checkpoints on a CPU by our kernels, because vLLM has none, and packed projections.

vLLM asks registered quantisation methods which of them takes a checkpoint; ours takes those of our
models. Each layer has the format that the checkpoint's files say.
"""

from collections.abc import Mapping
from copy import copy
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import (
    QuantizationConfig,
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.platforms import current_platform

from qwen3next_plugin import env
from qwen3next_plugin.engines.hub import READ_HERE, local_folder
from qwen3next_plugin.engines.vllm.files import weights_folder
from qwen3next_plugin.engines.vllm.names import MODELS, QUANTISATION
from qwen3next_plugin.model.kinds import model_kinds
from qwen3next_plugin.model.quantisation.files import leave_plain, read_formats, read_plain_modules
from qwen3next_plugin.model.quantisation.layers import (
    ExpertsMethod,
    LinearMethod,
    PlainMethod,
    Ranks,
    each_layer,
)
from qwen3next_plugin.model.quantisation.modules import ByFiles, Formats
from qwen3next_plugin.model.quantisation.packing import packs_plain


@register_quantization_config(QUANTISATION)
class Quantisation(ByFiles, QuantizationConfig):
    """Every quantised checkpoint of our models, on a CPU."""

    def __init__(self, raw: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.raw = raw
        self.model = ""
        self.revision: str | None = None
        self.downloads: str | None = None  # the folder into which vLLM downloads, if not the hub's
        self.hf_config: Any = None

    @property
    def formats(self) -> Formats:  # type: ignore[override]
        """The formats of the trunk's and the drafter's modules.

        Raises: CheckpointError for a module that is quantised as none of ours.
        """
        folder = local_folder(self.model, self.revision, self.downloads)
        return read_formats(folder, self.hf_config, self.raw)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # These take a second to import, and this file is imported wherever vLLM starts.
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

        from qwen3next_plugin.engines.vllm.cpu.experts import PackedExperts

        found = self.formats.of(prefix)
        if isinstance(layer, RoutedExperts):
            return PackedExperts(layer.moe_config, prefix, found) if found else None
        if isinstance(layer, LinearBase):
            return PackedLinear(prefix, found["weight"]) if found else UnquantizedLinearMethod()
        return None

    # What vLLM asks of a quantisation, besides what both engines do.

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        names = getattr(hf_config, "architectures", None) or ()
        ours = current_platform.is_cpu() and any(name in MODELS for name in names)
        return QUANTISATION if ours else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Quantisation":
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        self.model, self.revision, self.hf_config = model_name, revision, hf_config

    def get_name(self) -> str:
        return QUANTISATION


def choose_quantisation(vllm_config: VllmConfig) -> QuantizationConfig | None:
    """The checkpoint's, or ours where QWEN3NEXT_QUANTISE asks for it.

    vLLM checks flags before it makes the checkpoint's.
    """
    model_config, found = vllm_config.model_config, vllm_config.quant_config
    if found is None:
        ours = model_config.quantization == QUANTISATION
        if not ours and (model_config.quantization is not None or env.quantise() is None):
            return None
        found = Quantisation(model_config.model_arch_config.quantization_config)
        found.maybe_update_config(model_config.model, model_config.hf_config, model_config.revision)
    if isinstance(found, Quantisation):
        found.downloads = vllm_config.load_config.download_dir
    return found


def with_quantisation(vllm_config: VllmConfig) -> VllmConfig:
    """The configuration that a model's layers are built by."""
    found, model_config = copy(vllm_config), vllm_config.model_config
    found.quant_config = choose_quantisation(vllm_config)
    of_files = model_config.model_arch_config.quantization_config is not None
    read_here = vllm_config.load_config.load_format in READ_HERE
    if found.quant_config is None or current_platform.is_cpu() or not (of_files and read_here):
        return found
    plain = read_plain_modules(weights_folder(vllm_config), model_config.hf_config)
    found.quant_config = leave_plain(found.quant_config, plain, LinearBase, UnquantizedLinearMethod)
    return found


def own_rank() -> Ranks:
    """This process among the tensor-parallel ranks."""
    return Ranks(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size())


def use_packing(
    model: nn.Module, formats: Formats | None, drafting: nn.Module | None = None
) -> None:
    """Make vLLM pack what is not quantised of a model for our kernels, where these are chosen."""
    if current_platform.is_cpu():
        for kind in model_kinds():
            kind.use_packing(model, formats, UnquantizedLinearMethod, drafting=drafting is not None)
    for layer, as_int8 in each_layer(model, drafting):
        method = getattr(layer, "quant_method", None)
        if type(method) is UnquantizedLinearMethod and current_platform.is_cpu():
            if packs_plain(layer.weight.dtype):
                layer.quant_method = PackedProjection(as_int8=as_int8)
        elif isinstance(method, ExpertsMethod):
            method.as_int8 = as_int8


class PackedLinear(LinearMethod, LinearMethodBase):
    """A projection of a quantised checkpoint."""


class PackedProjection(PlainMethod, UnquantizedLinearMethod):
    """vLLM's unquantised projection, with our product."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return layer.packed(x, bias)
