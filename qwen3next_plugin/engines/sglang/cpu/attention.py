"""SGLang's CPU attention by our kernel, which takes chains of different lengths.

SGLang's own backend calls operators of `sgl_kernel` in each layer, with arguments for any model.
In a short step that takes longer than the attention itself.
"""

from typing import Any

import torch
from sglang.srt.layers.attention.intel_amx_backend import IntelAMXAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput
from qwen3next_plugin.kernels.paged_attention import paged_attention


class AttentionBackend(IntelAMXAttnBackend):
    """Attends to the KV cache of our models: no windows, no caps, no scales."""

    query_start_loc: torch.Tensor  # [N + 1] int32, where each request's tokens start in the step
    seq_lens: torch.Tensor  # [N] int64, tokens of each request, the step's included
    tree_mask: torch.Tensor | None  # of draft trees

    @override(
        "sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend.init_forward_metadata",
        reason="SGLang verifies the same number of tokens for each request, and prepares "
        "buffers that our kernel does not need",
        remove_when="SGLang's CPU backend reads lengths of their own",
    )
    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Prepare a step, for all layers."""
        mode, chains = forward_batch.forward_mode, forward_batch.spec_info
        self.seq_lens, self.tree_mask = forward_batch.seq_lens, None
        if mode.is_decode_or_idle():
            self.query_start_loc = torch.arange(forward_batch.batch_size + 1, dtype=torch.int32)
        elif mode.is_target_verify() and isinstance(chains, RaggedVerifyInput):
            self.query_start_loc = chains.query_start_loc.int()
            self.seq_lens = self.seq_lens + chains.query_start_loc.diff()
        else:
            self.seq_lens, counts, starts, self.tree_mask = self._build_extend_metadata(
                forward_batch
            )
            ends = starts[-1:] + counts[-1:]
            self.query_start_loc = torch.cat([starts, ends]).int()

    @override(
        "sglang.srt.layers.attention.intel_amx_backend.IntelAMXAttnBackend.forward_extend",
        reason="SGLang prepares arguments for any model, which in a short step takes longer "
        "than the attention",
        remove_when="SGLang lets a CPU backend name its kernel",
    )
    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        inputs: tuple[Any, ...] | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Store the step's keys and values, then attend; a layer with inputs does so itself.

        Shapes: q [T, Hq·D], k, v [T, Hkv, D], returns [T, Hq·D]
        """
        if inputs is not None:
            return layer.attend(q, k, v, inputs, forward_batch, self)
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        if save_kv_cache:
            for cache, new in ((keys, k), (values, v)):
                cache.index_copy_(0, forward_batch.out_cache_loc, new)
        attended = paged_attention(
            q=q.view(len(q), layer.tp_q_head_num, layer.qk_head_dim),
            key_cache=keys,
            value_cache=values,
            token_table=self.req_to_token_pool.req_to_token,
            table_row=forward_batch.req_pool_indices,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=layer.scaling,
            tree_mask=self.tree_mask,
        )
        return attended.flatten(1)

    forward_decode = forward_extend
