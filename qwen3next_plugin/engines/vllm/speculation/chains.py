"""Chains: the passes of the MTP layer over a batch, and the drafts that they make."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from qwen3next_plugin.engines.vllm.speculation.images import axes_of
from qwen3next_plugin.mtp.chains import extend
from qwen3next_plugin.mtp.images import Axes, mrope_positions
from qwen3next_plugin.mtp.rows import Row


class Chains(EagleProposer):
    """vLLM's drafter with our chains. Indices are numpy's: torch takes longer for a few numbers."""

    def _draft(self, fed: list[Row], block_table: Tensor, drafts: list[list[int]]) -> None:
        """Run the MTP layer over what the rows feed it, then over its own drafts.

        Shapes: block_table [N, blocks]; drafts N, of which those of the rows are filled in
        """
        fed = sorted(fed, key=lambda row: -row.draft)  # longest chains first
        tokens = [row.fed for row in fed if row.fed is not None]
        counts = [len(part) for part in tokens]
        table = block_table.numpy()[[row.index for row in fed]]
        axes = [axes_of(self.runner.requests[row.request]) for row in fed]
        positions = np.concatenate([np.arange(part.first, part.end) for part in tokens])
        token_ids = torch.cat([part.token_ids for part in tokens])
        self.model.see(token_ids)
        hidden_states, states = self._forward(
            token_ids,
            positions,
            torch.cat([part.hidden_states for part in tokens]),
            counts,
            table,
            axes,
        )
        ends = np.cumsum(counts) - 1
        drafting = [row for row in fed if row.draft]
        last = ends[: len(drafting)]
        positions = positions[last]

        def run(depth: int, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
            n = len(token_ids)
            at = positions[:n] + depth
            hidden_states, states = self._forward(
                token_ids, at, states, [1] * n, table[:n], axes[:n]
            )
            return self.model.get_top_tokens(hidden_states), states

        if drafting:
            first = self.model.get_top_tokens(hidden_states[last])
            lengths = [row.draft for row in drafting]
            for row, chain in zip(drafting, extend(lengths, first, states[last], run), strict=True):
                drafts[row.index] = chain

    def _forward(
        self,
        token_ids: Tensor,
        positions: np.ndarray,
        hidden_states: Tensor,
        counts: Sequence[int],
        table: np.ndarray,
        axes: Sequence[Axes | None],
    ) -> tuple[Tensor, Tensor]:
        """Run the MTP layer over `counts` tokens of each row.

        Returns what drafts come from, and what the next pass reads: the same, but for a model whose
        residual has several streams.

        Shapes:
            token_ids, positions [T], hidden_states [T, D] or [T, hc·D], counts, axes [fed],
            table [fed, blocks], returns [T, D], and as hidden_states
        """
        starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        block = table[np.repeat(np.arange(len(counts)), counts), positions // self.block_size]
        locations = block.astype(np.int64) * self.block_size + positions % self.block_size
        ends = positions[starts[1:] - 1] + 1
        query_start_loc, slot_mapping = torch.from_numpy(starts), torch.from_numpy(locations)
        seq_lens = torch.from_numpy(ends.astype(np.int32))
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=len(counts),
                num_actual_tokens=len(positions),
                max_query_len=max(counts),
                max_seq_len=int(ends.max()),
                block_table_tensor=torch.from_numpy(table),
                slot_mapping=slot_mapping,
                causal=True,
            )
        )
        at = torch.from_numpy(positions)
        if self.uses_mrope:
            on_axes = mrope_positions(axes, at, counts)
            at = at.expand(3, -1) if on_axes is None else on_axes
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=dict.fromkeys(metadata, slot_mapping),
        ):
            out = self.model(
                # The dtype for which vLLM compiled the layer, because it drops guards on dtypes.
                input_ids=token_ids.to(self.input_ids.dtype),
                positions=at,
                hidden_states=hidden_states,
            )
        return out if isinstance(out, tuple) else (out, out)
