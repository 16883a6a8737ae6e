"""The linear-attention backend: turns vLLM's per-step metadata into a Step.

vLLM's runner calls `StepBuilder.build` once a step, and passes the Step to every linear layer.
"""

from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from qwen3next_plugin import env
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.model.step import DeviceSteps, Step, build_step


class StepBuilder(AttentionMetadataBuilder[Step]):
    """Builds one Step per engine step from lengths and block tables alone.

    The builders of vLLM's own recurrent layers take the number of accepted drafts. Ours needs no
    count: a page records where it ends, so a roll-back needs only the context length.
    """

    reorder_batch_threshold: int | None = None

    def __init__(
        self,
        kv_cache_spec: MambaSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.cache_config = vllm_config.cache_config
        self.on_device = None
        if device.type != "cpu":
            # The batch of a CUDA graph may have one row more than vLLM schedules.
            self.on_device = DeviceSteps(vllm_config.scheduler_config.max_num_seqs + 1, device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """On a GPU any step can be captured: kernels read the rows there."""
        if current_platform.is_cpu() or env.kernels() == "reference":
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.ALWAYS

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Step:
        """Build the step of this batch."""
        common = common_attn_metadata
        rows: dict[str, Any] = {
            "query_start_loc": common.query_start_loc,
            "seq_lens": common.seq_lens,
            "num_tokens": common.num_actual_tokens,
            "max_query_len": common.max_query_len,
        }
        if self.on_device is not None:
            return self.on_device.build(**rows, slot=self._slots(common))
        slot = self._slots_on_cpu(common)
        return build_step(**rows, slot=slot, num_slots=self.cache_config.num_gpu_blocks)

    def _slots(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """The page of each row [N]."""
        table = mamba_get_block_table_tensor(
            common.block_table_tensor,
            common.seq_lens,
            self.kv_cache_spec,
            self.cache_config.mamba_cache_mode,
        )
        return table[:, 0]

    def _slots_on_cpu(self, common: CommonAttentionMetadata) -> torch.Tensor:
        """The same with fewer operators: with vLLM's prefix cache ("align") a row's page is in the
        block of its last token.
        """
        table = common.block_table_tensor.numpy()
        if self.cache_config.mamba_cache_mode == "none":
            return torch.from_numpy(table[:, 0])
        last = np.maximum(common.seq_lens.numpy() - 1, 0)
        block = last // self.kv_cache_spec.block_size
        return torch.from_numpy(table[np.arange(len(table)), block])


class GatedDeltaNetBackend(AttentionBackend):
    """Names the builder; the arithmetic is in the layer."""

    @staticmethod
    def get_name() -> str:
        return BACKEND_NAME

    @staticmethod
    def get_builder_cls() -> type[StepBuilder]:
        return StepBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Whether drafts may be trimmed on the device, as vLLM's adaptive verification does.

        True: the host reads only the number of tokens and the longest row before trimming, which
        are bounds of the trimmed batch, too.
        """
        return True
