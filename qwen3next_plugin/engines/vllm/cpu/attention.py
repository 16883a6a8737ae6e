"""vLLM's attention on a CPU by our kernel: a token's bits do not depend on other requests.

vLLM's kernel splits contexts of over 512 tokens by batch and chunk.
Blocks, metadata and planning stay vLLM's. Remove when its kernel is batch-invariant.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
)

from qwen3next_plugin import env
from qwen3next_plugin.kernels.paged_attention import paged_attention


class AttentionImpl(CPUAttentionBackendImpl):
    """A layer's attention over vLLM's blocks, each with its keys before its values."""

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Write this step's keys and values.

        Shapes: key, value [T, Hkv, D], kv_cache [blocks, Hkv, P, 2D], slot_mapping [T], below 0 of
        padding
        """
        used = slot_mapping >= 0
        slots = slot_mapping[used]
        P = kv_cache.shape[2]
        for cache, new in zip(_keys_and_values(kv_cache), (key, value), strict=True):
            cache[slots // P, slots % P] = new[: len(used)][used]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Shapes: query and output [T, Hq, D]; the metadata is None in vLLM's dry run."""
        if attn_metadata is None:
            return output
        T, sequences = attn_metadata.num_actual_tokens, attn_metadata.seq_lens
        keys, values = _keys_and_values(kv_cache)
        attended = paged_attention(
            q=query[:T],
            key_cache=keys,
            value_cache=values,
            token_table=attn_metadata.block_table,
            table_row=torch.arange(len(sequences), dtype=torch.int32),
            query_start_loc=attn_metadata.query_start_loc,
            seq_lens=sequences,
            scale=self.scale,
        )
        output[:T].copy_(attended.view_as(output[:T]))
        return output


class AttentionBackend(CPUAttentionBackend):
    """The classes of our attention, as vLLM looks them up."""

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        return AttentionImpl


def attention_backend() -> type[AttentionBackend] | None:
    """The backend of the full-attention layers; None: vLLM chooses."""
    return AttentionBackend if env.batch_invariant() else None


def _keys_and_values(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a cache [blocks, Hkv, P, 2D], each [blocks, P, Hkv, D]."""
    blocks, Hkv, P, _ = kv_cache.shape
    keys, values = kv_cache.view(blocks, Hkv, 2 * P, -1).chunk(2, dim=2)
    return keys.transpose(1, 2), values.transpose(1, 2)
