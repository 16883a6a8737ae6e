"""Sparse attention over vLLM's blocks, which have room for the indexer's keys.

So a block is copied, shared and freed with them: vLLM knows of no second cache.
"""

from dataclasses import replace
from functools import cache

import torch
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.utils.torch_utils import get_dtype_size
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.kv_cache_interface import AttentionSpec

from qwen3next_plugin.engines.vllm.model.opaque import register
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.indexed_attention import (
    BlockRule,
    Caches,
    Tokens,
    attend,
    index_elements,
)


class IndexedBackend(CPUAttentionBackend):
    """vLLM's attention on a CPU, with more elements for each token and key-value head."""

    more = 0

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        elements = spec.head_size + spec.head_size_v + cls.more
        return replace(spec, state_content_bytes=elements * get_dtype_size(spec.dtype))


@cache
def backend_with(more: int) -> type[IndexedBackend]:
    """The backend of a model whose indexer needs so many."""
    return type("IndexedBackend", (IndexedBackend,), {"more": more})


class IndexedLayer(Attention):
    """The layer that vLLM gives blocks to; `forward` takes what the indexer projects, too."""

    def __init__(self, config: Qwen4ExpConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.num_attention_heads_per_rank,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=config.num_key_value_heads_per_rank,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
            attn_backend=backend_with(index_elements(config)),
        )
        self.scale, self.rule = config.head_dim**-0.5, BlockRule.from_config(config)
        self.index_dims = config.indexer_head_dim

    def forward(self, q: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Shapes: q [T, Hq·D], and those of `attend`; returns [T, Hq·D]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        torch.ops.vllm.qwen3next_indexed_attention(q, *inputs, out, self.layer_name)
        return out

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take the layer's blocks. Shapes: kv_cache [blocks, Hkv, P, elements]"""
        super().bind_kv_cache(kv_cache)
        self.caches = Caches.view(
            kv_cache.flatten(1),
            P=kv_cache.shape[2],
            heads=self.num_kv_heads,
            dims=self.head_size,
            index_dims=self.index_dims,
            block_size=self.rule.block_size,
        )

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index_qk: torch.Tensor,
        q_weight: torch.Tensor,
        k_weight: torch.Tensor,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        out_: torch.Tensor,
    ) -> None:
        """Run the layer on this step's tokens; write zeros where vLLM runs no step.

        Shapes: q, out_ [T, Hq·D], k, v [T, Hkv·D], the others as of the neutral `attend`
        """
        metadata = (get_forward_context().attn_metadata or {}).get(self.layer_name)
        if metadata is None:  # profiling and tuning
            out_.zero_()
            return
        T = metadata.num_actual_tokens
        out_[:T] = attend(
            q=q[:T].unflatten(1, (self.num_heads, -1)),
            k=k[:T].unflatten(1, (self.num_kv_heads, -1)),
            v=v[:T].unflatten(1, (self.num_kv_heads, -1)),
            index_qk=index_qk[:T],
            q_weight=q_weight,
            k_weight=k_weight,
            cos_sin=cos_sin,
            positions=positions[:T],
            caches_=self.caches,
            tokens=Tokens(
                metadata.slot_mapping[:T],
                metadata.block_table,
                torch.arange(len(metadata.seq_lens), dtype=torch.int32),
                metadata.query_start_loc,
                metadata.seq_lens,
            ),
            scale=self.scale,
            rule=self.rule,
        ).flatten(1)


def _indexed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_qk: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    """The layer between its projections, as an op that is opaque to the compiler."""
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.attend(q, k, v, index_qk, q_weight, k_weight, cos_sin, positions, out)


register("qwen3next_indexed_attention", _indexed_attention, "out")
