"""Sparse attention over SGLang's KV cache.

Each KV location also holds index keys, so SGLang shares and frees both together.
"""

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.indexed_attention import BlockRule, Caches, Tokens, attend


class Index(NamedTuple):
    """What the indexer projects, and what its keys are made with; shapes as of `attend`."""

    index_qk: torch.Tensor
    q_weight: torch.Tensor
    k_weight: torch.Tensor
    cos_sin: torch.Tensor
    positions: torch.Tensor


class IndexedLayer(RadixAttention):
    """SGLang's attention layer; its `forward` takes what the indexer projects, too."""

    def __init__(
        self,
        config: Qwen4ExpConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        super().__init__(
            config.num_attention_heads_per_rank,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=config.num_key_value_heads_per_rank,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=prefix,
        )
        self.rule, self.index_dims = BlockRule.from_config(config), config.indexer_head_dim

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *inputs: Any
    ) -> torch.Tensor:
        """Shapes: q [T, Hq·D], k, v [T, Hkv·D], and those of `Index`; returns [T, Hq·D]."""
        *index, forward_batch = inputs
        return super().forward(q, k, v, forward_batch, inputs=Index(*index))

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        index: Index,
        forward_batch: ForwardBatch,
        backend: Any,
    ) -> torch.Tensor:
        """Run the layer on the step that a backend has prepared.

        Shapes: q [T, Hq·D], k, v [T, Hkv, D], returns [T, Hq·D]
        """
        keys, values = backend.token_to_kv_pool.get_kv_buffer(self.layer_id)
        heads, dims = self.tp_k_head_num, self.qk_head_dim
        attended = attend(
            q=q.view(len(q), self.tp_q_head_num, dims),
            k=k,
            v=v,
            **index._asdict(),
            caches_=Caches.of_tokens(
                keys.flatten(1),
                values.flatten(1),
                heads=heads,
                dims=dims,
                index_dims=self.index_dims,
            ),
            tokens=Tokens(
                forward_batch.out_cache_loc,
                backend.req_to_token_pool.req_to_token,
                forward_batch.req_pool_indices,
                backend.query_start_loc,
                backend.seq_lens,
            ),
            scale=self.scaling,
            rule=self.rule,
        )
        return attended.flatten(1)
