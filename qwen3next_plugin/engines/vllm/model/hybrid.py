"""What vLLM asks of a hybrid model with experts, beside its layers."""

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFunc,
    get_temporal_copy_spec,
)
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, MixtureOfExperts

from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.state.pages import PAGE_DTYPE, largest_page


class HybridModel(HasInnerState, IsHybrid, MixtureOfExperts):
    """The size of a page, asked for before a model is built, and where its experts are."""

    moe_layers: list[Any]
    num_logical_experts: int

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int]]:
        return ((largest_page(read_config(vllm_config), vllm_config).page_bytes,),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype]:
        return (PAGE_DTYPE,)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc]:
        return (get_temporal_copy_spec,)  # copies a page as a whole

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """The class by which model runner V2 copies pages; imported only for that runner."""
        from qwen3next_plugin.engines.vllm.state.model_state import Qwen3NextModelState

        return Qwen3NextModelState

    def update_physical_experts_metadata(
        self, num_physical_experts: int, num_local_physical_experts: int
    ) -> None:
        self.num_physical_experts = num_physical_experts
        self.num_local_physical_experts = num_local_physical_experts
        self.num_redundant_experts = num_physical_experts - self.num_logical_experts
        for experts in self.moe_layers:
            experts.update_expert_map()
