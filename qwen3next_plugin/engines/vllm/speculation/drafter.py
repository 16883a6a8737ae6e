"""Drafter: drafts as many tokens as pay, for each request its own number, down to none.

Replaces the loop of vLLM's EagleProposer, which runs every request through the MTP layer k times
in every step. vLLM still loads the layer and manages its cache.
"""

import time
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from qwen3next_plugin.engines.vllm.metrics import worker_board
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.speculation.images import axes_of
from qwen3next_plugin.mtp.images import Axes, mrope_positions
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending, PendingTokens, Row
from qwen3next_plugin.mtp.plain_steps import PlainSteps, wait_after
from qwen3next_plugin.mtp.policy import make_policy

logger = init_logger(LOGGER)


class Drafter(EagleProposer):
    """vLLM's drafter with our loop; one per worker. It also reads the runner's requests."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any) -> None:
        super().__init__(vllm_config, device, runner)
        self.runner = runner
        self.policy = make_policy(self.num_speculative_tokens)
        self.observer = Observer(self.policy, worker_board(vllm_config), logger.error)
        self.pending = Pending()
        # A KV connector ships the layer's cache at any time, so no token may be missing from it.
        self.must_run = vllm_config.kv_transfer_config is not None
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens  # of one pass
        self.next_position: dict[str, int] = {}  # of each request that may continue
        self.plain: PlainSteps | None = None  # if the next step may be one of them
        self.idle = 0  # steps in a row for which nothing was drafted
        self.left = 0.0  # when the last call of propose ended

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: torch.Tensor,
        target_positions: torch.Tensor,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        token_indices_to_sample: torch.Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: SamplingMetadata,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: torch.Tensor | None = None,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Draft up to k tokens for each request of the step that just ended.

        Shapes:
            target_token_ids, target_positions [T], target_hidden_states [T, D] of the step's
            tokens, rejected drafts included; next_token_ids [N], the last sampled tokens;
            token_indices_to_sample [N], the indices of the tokens that they were sampled after
            (None: the last token of each row)
        """
        entered = time.perf_counter()
        # `target_positions` of a model that reads images are not those in the sequence.
        positions = self.runner.positions[: len(target_token_ids)]
        requests, table = self.runner.input_batch.req_ids, common_attn_metadata.block_table_tensor
        if (
            self.plain is not None
            and len(target_token_ids) == len(requests)
            and self.plain.continued_by(requests, positions.tolist())
        ):
            self.idle += 1
            token_ids = next_token_ids.to(target_token_ids.dtype)
            self.plain.add(token_ids, target_hidden_states, entered - self.left)
            rows = self._look(self.plain) if len(self.plain) >= wait_after(self.idle) else []
        else:
            self._keep_plain()
            self.model.see(target_token_ids)
            rows = self._rows(
                common_attn_metadata.query_start_loc,
                token_indices_to_sample,
                target_token_ids,
                positions,
                target_hidden_states,
                next_token_ids,
            )
            self.observer.observe_step(rows, entered - self.left)
            self._choose_lengths(rows)
        drafts: list[list[int]] = [[] for _ in requests]
        began = self.left = time.perf_counter()
        if rows:
            self._limit_drafts(rows, num_speculative_tokens)
            # A pass reads at most as many tokens as a step.
            if fed := self.pending.feed(rows, self.max_tokens, every=self.must_run):
                self._draft(fed, table, drafts)
            self.left = time.perf_counter()
            self.observer.observe_draft(
                rows, passes_seconds=self.left - began, seconds=self.left - entered
            )
        return drafts

    def prepare_next_token_ids_padded(
        self,
        sampled_token_ids: torch.Tensor,
        requests: Any,
        gpu_input_batch: Any,
        discard_request_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As vLLM, which looks at each request; in a step without drafts each has one token.

        That of an unfinished prompt means nothing; `_rows` looks for the one that follows.
        """
        if sampled_token_ids.shape[1] == 1:
            next_token_ids = sampled_token_ids[:, 0].int()
            return next_token_ids, torch.ones_like(next_token_ids)
        return super().prepare_next_token_ids_padded(
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )

    def prepare_inputs_padded(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        spec_decode_metadata: SpecDecodeMetadata,
        valid_sampled_tokens_count: torch.Tensor,
    ) -> tuple[CommonAttentionMetadata, torch.Tensor | None, torch.Tensor | None]:
        """As vLLM, with nothing to prepare in a step without drafts."""
        if not any(spec_decode_metadata.num_draft_tokens):
            return common_attn_metadata, None, None
        return super().prepare_inputs_padded(
            common_attn_metadata, spec_decode_metadata, valid_sampled_tokens_count
        )

    def _rows(
        self,
        query_start_loc: torch.Tensor,
        sampled_after: torch.Tensor | None,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
    ) -> list[Row]:
        """The rows of the step; their tokens are shifted by one, as the MTP layer reads them."""
        starts = query_start_loc.numpy()
        ends = starts[1:] if sampled_after is None else sampled_after.numpy() + 1
        scheduled, counts = np.diff(starts).tolist(), (ends - starts[:-1]).tolist()
        firsts = positions.numpy()[starts[:-1]].tolist()
        prefilling = self.runner.discard_request_mask.np[: len(firsts)].tolist()
        shifted = next_token_ids.to(token_ids.dtype)  # [T]
        if len(shifted) < len(token_ids):  # not one token a row
            shifted, sampled = token_ids.roll(-1), shifted
            shifted.index_copy_(0, torch.from_numpy(ends - 1).long(), sampled)
        requests = self.runner.input_batch.req_ids
        parts = zip(shifted.split(scheduled), hidden_states.split(scheduled), strict=True)
        rows = []
        for i, (ids, states) in enumerate(parts):
            request, first, count = requests[i], firsts[i], counts[i]
            if prefilling[i]:  # vLLM gives the prompt's last token, not the one after the chunk
                ids[-1] = self.runner.requests[request].get_token_id(first + count)
            if count < scheduled[i]:  # without the rejected drafts
                ids, states = ids[:count], states[:count]
            row = Row(
                request=request,
                index=i,
                tokens=PendingTokens(first, ids, states),
                scheduled=scheduled[i],
                prefilling=prefilling[i],
                continues=self.next_position.get(request) == first,
            )
            rows.append(row)
        known = self.runner.requests.keys()  # those that wait after a preemption included
        self.observer.keep_only(known)
        self.pending.keep_only(known)
        return rows

    def _look(self, plain: PlainSteps) -> list[Row]:
        """Learn from plain steps and choose lengths; the rows of the last if they draft."""
        self.model.see(torch.cat(plain.token_ids))
        if rows := plain.look(self._lengths):
            self._go_on_after(rows)
        else:
            self.next_position = dict(zip(plain.requests, plain.firsts, strict=True))
        return rows

    def _keep_plain(self) -> None:
        """Keep the plain steps so far for the MTP layer, without choosing lengths."""
        if self.plain is not None and len(self.plain):
            self.model.see(torch.cat(self.plain.token_ids))
            self.plain.keep()
            self.next_position = dict(zip(self.plain.requests, self.plain.firsts, strict=True))

    def _choose_lengths(self, rows: list[Row]) -> None:
        """Set how many tokens each request drafts.

        None where the step read its prompt: the first token of an answer does not wait for drafts.
        """
        drafting = [row for row in rows if row.continues]
        for row, length in zip(drafting, self._lengths([r.request for r in drafting]), strict=True):
            row.draft = length
        self._go_on_after(rows)

    def _lengths(self, requests: list[str], more: int = 0) -> list[int]:
        """Lengths by the policy. All ranks use the first rank's decision.

        `more`: tokens of each request that will be pending, besides those that are.
        """
        if not requests:
            return []
        lengths = self.policy.lengths(requests, [self.pending.count(r) + more for r in requests])
        group = get_tp_group()
        if group.world_size > 1:
            lengths = group.broadcast(torch.tensor(lengths, dtype=torch.int64), src=0).tolist()
        return lengths

    def _go_on_after(self, rows: list[Row]) -> None:
        """Note where requests go on. Expect plain steps next if none of these rows drafts."""
        self.plain = None
        self.next_position = {row.request: row.tokens.end for row in rows if not row.prefilling}
        if any(row.draft for row in rows):
            self.idle = 0
        elif not self.must_run and not any(row.prefilling for row in rows):
            ends = [row.tokens.end for row in rows]
            requests = [row.request for row in rows]
            self.plain = PlainSteps(requests, ends, self.observer, self.pending)

    def _limit_drafts(self, rows: list[Row], limit: int) -> None:
        for row in rows:
            if row.draft:
                row.draft = max(0, min(row.draft, limit, self._room(row)))

    def _room(self, row: Row) -> int:
        """How many drafts the request can still use; a step yields one token more."""
        state = self.runner.requests[row.request]
        end = self.runner.max_model_len
        if (params := state.sampling_params) is not None and params.max_tokens is not None:
            end = min(end, state.num_prompt_tokens + params.max_tokens)
        return end - row.tokens.end - 2  # the last sampled token, and the one after the drafts

    def _draft(self, fed: list[Row], block_table: torch.Tensor, drafts: list[list[int]]) -> None:
        """Run the MTP layer over what the rows feed it, then over its own drafts."""
        tokens = [row.fed for row in fed if row.fed is not None]
        counts = [len(part) for part in tokens]
        block_table = block_table[[row.index for row in fed]]
        axes = [axes_of(self.runner.requests[row.request]) for row in fed]
        positions = torch.cat([torch.arange(part.first, part.end) for part in tokens])
        hidden_states = self._forward(
            torch.cat([part.token_ids for part in tokens]),
            positions,
            torch.cat([part.hidden_states for part in tokens]),
            counts,
            block_table,
            axes,
        )
        ends = torch.tensor(counts).cumsum(0) - 1
        hidden_states, positions = hidden_states[ends], positions[ends]  # [fed, D], [fed]
        token_ids = torch.zeros(len(fed), dtype=torch.int64)
        for depth in range(max(row.draft for row in fed)):
            keep = [i for i, row in enumerate(fed) if row.draft > depth]
            if len(keep) < len(fed):
                fed, axes = [fed[i] for i in keep], [axes[i] for i in keep]
                hidden_states, positions = hidden_states[keep], positions[keep]
                token_ids, block_table = token_ids[keep], block_table[keep]
            if depth > 0:
                positions = positions + 1
                ones = [1] * len(fed)
                hidden_states = self._forward(
                    token_ids, positions, hidden_states, ones, block_table, axes
                )
            token_ids = self.model.get_top_tokens(hidden_states)  # [fed]
            for row, token in zip(fed, token_ids.tolist(), strict=True):
                drafts[row.index].append(token)

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        counts: list[int],
        block_table: torch.Tensor,
        axes: list[Axes | None],
    ) -> torch.Tensor:
        """Run the MTP layer over `counts` tokens of each row; returns [T, D]."""
        query_start_loc = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        seq_lens = (positions[query_start_loc[1:] - 1] + 1).to(torch.int32)
        # Not repeat_interleave, which starts all threads.
        row = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
        block = block_table[row, positions // self.block_size].long()
        slot_mapping = block * self.block_size + positions % self.block_size
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=len(counts),
                num_actual_tokens=len(positions),
                max_query_len=max(counts),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=block_table,
                slot_mapping=slot_mapping,
                causal=True,
            )
        )
        if self.uses_mrope:
            on_axes = mrope_positions(axes, positions, counts)
            positions = positions.expand(3, -1) if on_axes is None else on_axes
        with set_forward_context(
            metadata,
            self.vllm_config,
            num_tokens=len(token_ids),
            slot_mapping=dict.fromkeys(metadata, slot_mapping),
        ):
            return self.model(
                # The dtype that vLLM compiled the layer for: it drops the guards against others.
                input_ids=token_ids.to(self.input_ids.dtype),
                positions=positions,
                hidden_states=hidden_states,
            )
