"""Gated DeltaNet as a vLLM layer: vLLM's pages around the neutral layer."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.loading import projection_layout
from qwen3next_plugin.engines.vllm.model.opaque import register
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.engines.vllm.state.pages import (
    PAGE_DTYPE,
    largest_page,
    page_layout,
    page_spec,
)
from qwen3next_plugin.model.gated_delta_net import attend, idle_step, launch_idle
from qwen3next_plugin.model.linear_attention import LinearAttention
from qwen3next_plugin.model.state import StateError, StatePool


class GatedDeltaNet(LinearAttention, MambaBase):
    """One linear-attention layer. vLLM binds its state pages to it, and finds it by its prefix."""

    def __init__(
        self,
        config: Qwen3NextConfig,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        shared: bool = False,
    ) -> None:
        """Args: shared: another layer keeps its state in the pages, too."""
        super().__init__(
            config,
            host_layers(vllm_config),
            prefix,
            rank=get_tensor_model_parallel_rank(),
            layout=projection_layout(config, vllm_config),
        )
        self.layout = page_layout(config, vllm_config, shared=shared)
        self.largest = largest_page(config, vllm_config)
        self.max_rows = vllm_config.scheduler_config.max_num_seqs
        self.value_dim = config.value_dim_per_rank
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in layers:
            raise ValueError(f"Duplicate layer name: {prefix}")
        layers[prefix] = self

    def core(self, qkvz: torch.Tensor, ba: torch.Tensor, *batch: Any) -> torch.Tensor:
        """Shapes: qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], returns [T, HV·V]."""
        out = qkvz.new_empty(qkvz.shape[0], self.value_dim)
        torch.ops.vllm.qwen3next_gated_delta_net(qkvz, ba, out, self.prefix)
        return out

    def attend(self, qkvz: torch.Tensor, ba: torch.Tensor, out_: torch.Tensor) -> None:
        """Run the recurrence on this step's rows; where vLLM has none, write zeros.

        Shapes:
            qkvz [T, H·(2K + 2R·V)], ba [T, H·2R], out_ [T, HV·V]

        Raises:
            StateError: a page that cannot serve the step; names the layer.
        """
        step = (get_forward_context().attn_metadata or {}).get(self.prefix)
        pool = self.layout.spare_pool(qkvz.device) if step is None else self.pool
        if step is None:  # profiling and tuning: no pages, but vLLM counts the memory
            step = idle_step(len(qkvz), qkvz.device, rows=self.max_rows)
        assert pool is not None
        try:
            attend(
                qkvz=qkvz,
                ba=ba,
                weights=self.weights,
                shape=self.shape,
                pool_=pool,
                step=step,
                out_=out_,
            )
        except RuntimeError as error:
            raise StateError(self.prefix, str(error)) from error

    # What vLLM asks of a layer with a recurrent state.

    @property
    def kv_cache(self) -> Sequence[torch.Tensor]:
        """The pages as vLLM copies them."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, pages: Sequence[torch.Tensor]) -> None:
        """Drop the views too: vLLM sets this to free the memory of its pages."""
        self._kv_cache = pages
        self.pool: StatePool | None = None
        self.parts: Mapping[str, torch.Tensor] = {}

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's pages: `kv_cache` [slots, 1, 1, bytes] int8."""
        pages = kv_cache.squeeze(dim=(1, 2))
        self.kv_cache = (pages[:, : self.layout.page_bytes],)  # what vLLM copies
        self.pool, self.parts = self.layout.view(pages), self.layout.view_parts(pages)
        if self.pool.span.device.type != "cpu":  # compile now, not at the first request
            launch_idle(weights=self.weights, shape=self.shape, pool_=self.pool)

    def get_state_shape(self) -> Iterable[tuple[int, ...]]:
        return ((self.layout.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (PAGE_DTYPE,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum[BACKEND_NAME]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> MambaSpec:
        return page_spec(self.largest, vllm_config)


@eager_break_during_capture
def _linear_attention(
    qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: str
) -> None:
    """The layer between its projections, as an op that is opaque to the compiler.

    It writes into a given tensor, out [T, HV·V]: vLLM cuts CUDA graphs at this op, and the next
    graph reads the same address as when it was captured.
    """
    get_forward_context().no_compile_layers[layer_name].attend(qkvz, ba, out)


register("qwen3next_gated_delta_net", _linear_attention, "out")
