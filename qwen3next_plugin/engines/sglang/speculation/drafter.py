"""Drafter: chains of drafts from the int8 head, and none at all when drafts do not pay.

Replaces the passes of SGLang's EagleDraftWorker over a chain. SGLang runs the MTP layer over all
verified tokens, the rejected ones too, computes logits of the whole vocabulary for each, and does
so even if nothing is drafted. SGLang still loads the layer, manages its cache, and drafts trees
(topk > 1) by itself.
"""

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_utils import (
    _eagle_prefill_tail_tokens,
    per_step_draft_out_cache_loc,
)
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.pending import MAX_PENDING, Pending, PendingTokens, Row
from qwen3next_plugin.mtp.policy import Policy, make_policy


class Drafter(EagleDraftWorker):
    """SGLang's draft worker with our chains; one per worker. `begin` follows its construction."""

    policy: Policy
    observer: Observer
    pending: Pending
    rows: list[Row]  # of the last verification
    next_steps: int  # drafts of each request in the next step

    def begin(self) -> None:
        """Add what is ours to a draft worker that SGLang has built."""
        config = self.target_worker.model_runner.model.config
        self.policy = make_policy(config, self.speculative_num_steps, uniform=True)
        self.observer = Observer(self.policy, Board(self.speculative_num_steps))
        self.pending = Pending()
        self.rows = []
        self.next_steps = self.speculative_num_steps
        self.draft_runner.model.make_draft_head()

    def see(self, token_ids: torch.Tensor) -> None:
        """Let the draft vocabulary follow these tokens. Shapes: token_ids [T]."""
        self.draft_runner.model.see(token_ids)

    def learn(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> None:
        """Learn from a verification and the drafts before it; choose the lengths of the next."""
        rows = self._rows(batch, result)
        if not rows:
            self.rows = []
            return
        before = {row.request: row for row in self.rows}
        timed = all(row.request in before for row in rows)  # no step between them read a prompt
        self.observer.observe_step(rows, step_seconds if timed else None)
        if timed:
            drafted = [before[row.request] for row in rows]
            self.observer.observe_draft(
                drafted, passes_seconds=draft_seconds, seconds=draft_seconds
            )
        self.observer.keep_only({row.request for row in rows})
        self._choose_lengths(rows)
        self.rows = rows

    def _rows(self, batch: ScheduleBatch, result: GenerationBatchResult) -> list[Row]:
        """The rows of a verification, with their tokens as the MTP layer reads them."""
        n = self.speculative_num_draft_tokens
        token_ids = result.next_token_ids.view(-1, n).long()
        hidden_states = result.logits_output.hidden_states.unflatten(0, (-1, n))  # [N, n, D]
        counts, firsts = result.accept_lens.tolist(), batch.seq_lens.tolist()
        return [
            Row(
                request=request.rid,
                index=i,
                tokens=PendingTokens(firsts[i], token_ids[i, :count], hidden_states[i, :count]),
                scheduled=n,
                continues=True,
            )
            for i, (request, count) in enumerate(zip(batch.reqs, counts, strict=True))
        ]

    def _choose_lengths(self, rows: list[Row]) -> None:
        """Set how many tokens each request drafts. All ranks use the first rank's decision."""
        requests = [row.request for row in rows]
        pending = [self.pending.count(request) for request in requests]
        self.next_steps = max(self.policy.lengths(requests, pending))
        group = get_parallel().tp_group
        if group.world_size > 1:
            self.next_steps = int(group.broadcast(torch.tensor([self.next_steps]), src=0))
        for row in rows:
            row.draft = self.next_steps

    def _feed(self, rows: list[Row]) -> list[Row]:
        """Set what the MTP layer reads now, pending tokens included: for all rows, or for none."""
        self.pending.keep_only({row.request for row in rows})  # no other request continues
        run = any(row.draft or self._must_run(row) for row in rows)
        if not run:
            self.pending.put(rows)
            return []
        for row in rows:
            row.fed = self.pending.take(row, MAX_PENDING + len(row.tokens)) or row.tokens
        return rows

    def _must_run(self, row: Row) -> bool:
        """Whether the request must run through the MTP layer even if it drafts nothing."""
        return self.pending.count(row.request) + len(row.tokens) > MAX_PENDING

    def _draft_extend_for_prefill(
        self,
        batch: ScheduleBatch,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        mm_input_embeds: torch.Tensor | None = None,
        kv_loc_plan: Any = None,
    ) -> EagleDraftInput:
        """Run the MTP layer over prompts; make the first draft of each request."""
        self.see(batch.input_ids)
        ends = torch.tensor(batch.extend_lens).cumsum(0) - 1  # [N]
        shifted = batch.input_ids.roll(-1)
        shifted[ends] = _eagle_prefill_tail_tokens(batch, next_token_ids).to(shifted.dtype)
        batch.input_ids = shifted
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=target_hidden_states, num_tokens_per_req=1
        )
        forward_batch = ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
            kv_loc_plan=kv_loc_plan,
        )
        forward_batch.return_logprob = False
        hidden_states = self.draft_runner.forward(forward_batch).logits_output.hidden_states
        draft = EagleDraftInput(
            bonus_tokens=next_token_ids, num_tokens_per_req=1, num_tokens_for_logprob_per_req=1
        )
        self._first_drafts(draft, hidden_states[ends])
        return draft

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, *, kv_loc_plan: Any = None
    ) -> None:
        """Run the MTP layer over committed tokens; make the first drafts, unless none follow."""
        draft = batch_result.next_draft_input
        fed = self._feed(self.rows)
        if fed:
            tokens = [row.fed for row in fed if row.fed is not None]
            hidden_states = self._forward(batch, tokens)
            ends = torch.tensor([len(part) for part in tokens]).cumsum(0) - 1  # [N]
            self._first_drafts(draft, hidden_states[ends])
        else:
            self._no_drafts(draft, len(self.rows))
        for row in self.rows:
            row.free_hidden_states()

    def _forward(self, batch: ScheduleBatch, tokens: list[PendingTokens]) -> torch.Tensor:
        """Run the MTP layer over the tokens of each request of the batch; returns [T, D]."""
        firsts, counts = [part.first for part in tokens], [len(part) for part in tokens]
        table = self.req_to_token_pool.req_to_token
        slots = [
            table[request, part.first : part.end]
            for request, part in zip(batch.req_pool_indices.tolist(), tokens, strict=True)
        ]
        batch.input_ids = torch.cat([part.token_ids for part in tokens])
        batch.out_cache_loc = torch.cat(slots).long()
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=torch.cat([part.hidden_states for part in tokens]), num_tokens_per_req=1
        )
        batch.prefix_lens, batch.extend_lens = firsts, counts
        batch.extend_num_tokens = sum(counts)
        batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        forward_batch = ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )
        forward_batch.seq_lens = torch.tensor([part.end for part in tokens])
        forward_batch.seq_lens_cpu = forward_batch.seq_lens
        forward_batch.seq_lens_sum = int(forward_batch.seq_lens.sum())
        return self.draft_runner.forward(forward_batch).logits_output.hidden_states

    def draft_forward(self, forward_batch: ForwardBatch) -> tuple[Any, ...]:
        """Extend each request's first draft to a chain; returns what SGLang's method returns."""
        spec_info: EagleDraftInput = forward_batch.spec_info
        steps, N = self.speculative_num_steps, forward_batch.batch_size
        slots = per_step_draft_out_cache_loc(forward_batch.out_cache_loc, N, 1, steps)
        tokens = [spec_info.topk_index]  # [N, 1] each
        for i in range(steps - 1):
            forward_batch.input_ids = tokens[-1].flatten()
            forward_batch.out_cache_loc = slots[i]
            backend = self.draft_attn_backend.attn_backends[i]
            with forward_context(ForwardContext(attn_backend=backend), forward_batch=forward_batch):
                output = self.draft_runner.forward(forward_batch).logits_output
            spec_info.hidden_states = output.hidden_states
            tokens.append(self.draft_runner.model.get_top_tokens(output.hidden_states)[:, None])
            forward_batch.positions.add_(1)
        return (
            self._topk1_parents_prealloc[:N],
            self._topk1_score_indices_prealloc[:N],
            torch.cat(tokens, dim=1),
            None,
        )

    def _first_drafts(self, draft: EagleDraftInput, hidden_states: torch.Tensor) -> None:
        """Choose the first drafts. Shapes: hidden_states [N, D] of each request's last token."""
        draft.topk_index = self.draft_runner.model.get_top_tokens(hidden_states)[:, None]
        draft.topk_p = torch.ones_like(draft.topk_index, dtype=torch.float32)
        draft.hidden_states = hidden_states

    def _no_drafts(self, draft: EagleDraftInput, N: int) -> None:
        """Fill what SGLang carries along and nothing reads: the next step verifies no drafts."""
        D = self.draft_runner.model.config.hidden_size
        draft.topk_index = torch.zeros(N, 1, dtype=torch.int64)
        draft.topk_p = torch.zeros(N, 1)
        draft.hidden_states = torch.zeros(N, D, dtype=self.draft_runner.dtype)
