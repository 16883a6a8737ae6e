"""The drafting half of the worker: chains from the int8 head, and nothing where drafts do not pay.

Replaces the passes of SGLang's EagleDraftWorker over a chain. SGLang's run the MTP layer over all
tokens that were verified, the rejected ones too, and compute logits of the whole vocabulary for
each; they also run where nothing is drafted. Loading and the layer's cache stay the host's, trees
(topk > 1) its altogether.
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
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_utils import (
    _eagle_prefill_tail_tokens,
    per_step_draft_out_cache_loc,
)
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.mtp.pending import MAX_PENDING, Pending, PendingTokens


class Drafter(EagleDraftWorker):
    """SGLang's draft worker, drafting chains our way; `begin` follows its construction."""

    pending: Pending
    next_steps: int  # drafts of each request in the step to come

    def begin(self) -> None:
        """Take over a draft worker that SGLang has built."""
        self.pending = Pending()
        self.next_steps = self.speculative_num_steps
        self.draft_runner.model.make_draft_head()

    def see(self, token_ids: torch.Tensor) -> None:
        """Let drafts follow what is asked and answered. Shapes: token_ids [T]."""
        self.draft_runner.model.draft_head.see(token_ids)

    def _draft_extend_for_prefill(
        self,
        batch: ScheduleBatch,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        mm_input_embeds: torch.Tensor | None = None,
        kv_loc_plan: Any = None,
    ) -> EagleDraftInput:
        """Run the MTP layer over a prompt; each request's first draft."""
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
        """Run the MTP layer over what was accepted, and what was left out; the first drafts.

        Where the next step drafts nothing, the rows are kept for later instead.
        """
        rows = self._accepted(batch, batch_result)
        rids = [request.rid for request in batch.reqs]
        draft = batch_result.next_draft_input
        if not self.next_steps and not self._may_not_lag(rids, rows):
            for rid, row in zip(rids, rows, strict=True):
                self.pending.put(rid, row)
            self.pending.keep_only(set(rids))  # the others have ended, or will read their text anew
            self._no_drafts(draft, len(rids))
            return
        rows = [self.pending.take(rid, row) for rid, row in zip(rids, rows, strict=True)]
        self.pending.keep_only(set())
        counts = [len(row) for row in rows]
        hidden_states = self._extend(batch, rows, counts)
        self._first_drafts(draft, hidden_states[torch.tensor(counts).cumsum(0) - 1])

    def _accepted(self, batch: ScheduleBatch, result: GenerationBatchResult) -> list[PendingTokens]:
        """What each request commits of the step: its tokens, and the trunk's states before them."""
        n = self.speculative_num_draft_tokens
        token_ids = result.next_token_ids.view(-1, n).long()
        hidden_states = result.logits_output.hidden_states.unflatten(0, (-1, n))  # [N, n, D]
        counts, firsts = result.accept_lens.tolist(), batch.seq_lens.tolist()
        return [
            PendingTokens(first, token_ids[i, :count], hidden_states[i, :count])
            for i, (first, count) in enumerate(zip(firsts, counts, strict=True))
        ]

    def _may_not_lag(self, rids: list[str], rows: list[PendingTokens]) -> bool:
        """Whether a request would be too far behind."""
        pairs = zip(rids, rows, strict=True)
        return any(self.pending.count(rid) + len(row) > MAX_PENDING for rid, row in pairs)

    def _extend(
        self, batch: ScheduleBatch, rows: list[PendingTokens], counts: list[int]
    ) -> torch.Tensor:
        """One pass of the MTP layer over rows of any length; returns [T, D]."""
        firsts = [row.first for row in rows]
        table = self.req_to_token_pool.req_to_token
        requests = batch.req_pool_indices.tolist()
        batch.input_ids = torch.cat([row.token_ids for row in rows])
        batch.out_cache_loc = torch.cat(
            [
                table[request, first : first + count]
                for request, first, count in zip(requests, firsts, counts, strict=True)
            ]
        ).long()
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=torch.cat([row.hidden_states for row in rows]), num_tokens_per_req=1
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
        forward_batch.seq_lens = torch.tensor(firsts) + torch.tensor(counts)
        forward_batch.seq_lens_cpu = forward_batch.seq_lens
        forward_batch.seq_lens_sum = int(forward_batch.seq_lens.sum())
        return self.draft_runner.forward(forward_batch).logits_output.hidden_states

    def draft_forward(self, forward_batch: ForwardBatch) -> tuple[Any, ...]:
        """Follow each request's first draft with more of its own."""
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
            tokens.append(self.draft_runner.model.draft_head(output.hidden_states)[:, None])
            forward_batch.positions.add_(1)
        return (
            self._topk1_parents_prealloc[:N],
            self._topk1_score_indices_prealloc[:N],
            torch.cat(tokens, dim=1),
            None,
        )

    def _first_drafts(self, draft: EagleDraftInput, hidden_states: torch.Tensor) -> None:
        """Shapes: hidden_states [N, D], of each request's last token."""
        draft.topk_index = self.draft_runner.model.draft_head(hidden_states)[:, None]
        draft.topk_p = torch.ones_like(draft.topk_index, dtype=torch.float32)
        draft.hidden_states = hidden_states

    def _no_drafts(self, draft: EagleDraftInput, N: int) -> None:
        """What SGLang carries along, unread: the next step verifies one token a request."""
        D = self.draft_runner.model.config.hidden_size
        draft.topk_index = torch.zeros(N, 1, dtype=torch.int64)
        draft.topk_p = torch.zeros(N, 1)
        draft.hidden_states = torch.zeros(N, D, dtype=self.draft_runner.dtype)
