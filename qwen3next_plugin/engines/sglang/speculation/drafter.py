"""Drafter: chains of drafts from the int8 head, and none at all when drafts do not pay.

Replaces the passes of SGLang's EagleDraftWorker over a chain. SGLang runs the MTP layer over all
verified tokens, the rejected ones too, computes logits of the whole vocabulary for each, and does
so even if nothing is drafted. SGLang still loads the layer, manages its cache, and drafts trees
(topk > 1) by itself.
"""

from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_utils import (
    _eagle_prefill_tail_tokens,
    per_step_draft_out_cache_loc,
)
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.pending import Pending, PendingTokens, Row
from qwen3next_plugin.mtp.policy import Policy, make_policy


class Drafter(EagleDraftWorker):
    """SGLang's draft worker with our chains; one per worker. `begin` follows its construction."""

    policy: Policy
    observer: Observer
    pending: Pending
    limit: int  # tokens that one pass of the MTP layer reads
    rows: list[Row]  # of the last step that decoded
    next_steps: int  # drafts of each request in the next step
    drafting: set[str]  # requests whose first draft is made
    read: dict[str, Req]  # those whose prompts were read since the last step
    chunked: Req | None  # the one of them whose prompt goes on

    def begin(self) -> None:
        """Add what is ours to a draft worker that SGLang has built."""
        config = self.target_worker.model_runner.model.config
        self.policy = make_policy(config, self.speculative_num_steps, uniform=True)
        self.observer = Observer(self.policy, Board(self.speculative_num_steps))
        self.pending = Pending()
        chunk, whole = get_schedule().chunked_prefill_size, get_schedule().max_prefill_tokens
        self.limit = chunk if chunk > 0 else whole
        self.rows, self.next_steps, self.drafting = [], 0, set()
        self.read, self.chunked = {}, None
        self.draft_runner.model.make_draft_head()

    def steps(self, batch: ScheduleBatch) -> int:
        """How many drafts the step verifies of each request; none if no request has a draft."""
        drafting = any(request.rid in self.drafting for request in batch.reqs)
        return self.next_steps if drafting else 0

    def learn(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> None:
        """Learn from a step and the drafts before it; choose the lengths of the next."""
        rows = self._rows(batch, result)
        before = {row.request for row in self.rows}
        timed = all(row.request in before for row in rows)  # no step between them read a prompt
        self.observer.observe_step(rows, step_seconds if timed else None)
        if self.rows:
            passes_seconds = draft_seconds if timed else None
            self.observer.observe_draft(
                self.rows, passes_seconds=passes_seconds, seconds=draft_seconds
            )
        self.rows = rows
        self._keep_known()
        self.read = {rid: request for rid, request in self.read.items() if request is self.chunked}
        self._choose_lengths(rows)

    def _rows(self, batch: ScheduleBatch, result: GenerationBatchResult) -> list[Row]:
        """The rows of a step, with their committed tokens as the MTP layer reads them."""
        n = result.speculative_num_draft_tokens
        token_ids = result.next_token_ids.long().view(-1, n).unbind()  # [n] each
        hidden_states = result.logits_output.hidden_states.unflatten(0, (-1, n)).unbind()
        counts = result.accept_lens.tolist()
        parts = zip(batch.seq_lens.tolist(), token_ids, hidden_states, strict=True)
        tokens = [PendingTokens(*part) for part in parts]
        if n > 1:  # without the rejected drafts
            tokens = [part.head(count) for part, count in zip(tokens, counts, strict=True)]
        return [
            Row(
                request=request.rid,
                index=i,
                tokens=part,
                scheduled=n,
                continues=True,
                padded=request.rid not in self.drafting,
            )
            for i, (request, part) in enumerate(zip(batch.reqs, tokens, strict=True))
        ]

    def _keep_known(self) -> None:
        """Forget requests that have ended; those that were retracted are read anew."""
        known = {row.request for row in self.rows} | self.read.keys()
        self.observer.keep_only(known)
        self.pending.keep_only(known)

    def _choose_lengths(self, rows: list[Row]) -> None:
        """Set how many tokens each request drafts. All ranks use the first rank's decision."""
        requests = [row.request for row in rows]
        pending = [self.pending.count(request) for request in requests]
        lengths = self.policy.lengths(requests, pending)
        group = get_parallel().tp_group
        if group.world_size > 1:
            lengths = group.broadcast(torch.tensor(lengths), src=0).tolist()
        for row, length in zip(rows, lengths, strict=True):
            row.draft = length

    def _draft_extend_for_prefill(
        self,
        batch: ScheduleBatch,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        mm_input_embeds: torch.Tensor | None = None,
        kv_loc_plan: Any = None,
    ) -> EagleDraftInput:
        """Keep prompts for the MTP layer: it reads those of requests that draft later."""
        ends = torch.tensor(batch.extend_lens).cumsum(0) - 1  # [N]
        shifted = batch.input_ids.roll(-1).long()
        shifted[ends] = _eagle_prefill_tail_tokens(batch, next_token_ids).long()
        token_ids = shifted.split(batch.extend_lens)
        hidden_states = target_hidden_states.split(batch.extend_lens)
        rows = [
            Row(
                request=request.rid,
                index=i,
                tokens=PendingTokens(batch.prefix_lens[i], token_ids[i], hidden_states[i]),
                scheduled=len(token_ids[i]),
                continues=False,
            )
            for i, request in enumerate(batch.reqs)
        ]
        going_on = {rid: request for rid, request in self.read.items() if not request.finished()}
        self.read = going_on | {request.rid: request for request in batch.reqs}
        self.chunked = batch.chunked_req
        self.drafting -= self.read.keys()
        self._keep_known()
        self.pending.put(rows)
        return self._drafts(next_token_ids, [], target_hidden_states[:0])

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, *, kv_loc_plan: Any = None
    ) -> None:
        """Run the MTP layer for the requests that draft; make their first drafts."""
        hidden_states = batch_result.logits_output.hidden_states[:0]
        if fed := self.pending.feed(self.rows, self.limit):
            hidden_states = self._forward(batch, fed)
        drafting = [row for row in fed if row.draft]
        batch_result.next_draft_input = self._drafts(
            batch_result.next_draft_input.bonus_tokens, drafting, hidden_states
        )
        self.drafting = {row.request for row in drafting}
        self.next_steps = max((row.draft for row in drafting), default=0)
        for row in self.rows:
            row.free_hidden_states()

    def _forward(self, batch: ScheduleBatch, fed: list[Row]) -> torch.Tensor:
        """Run the MTP layer over what it reads of rows; the last of each that drafts [drafting, D].

        Changes the batch, which SGLang restores after the step.
        """
        tokens = [row.fed for row in fed if row.fed is not None]
        firsts, counts = [part.first for part in tokens], [len(part) for part in tokens]
        batch.reqs = [batch.reqs[row.index] for row in fed]
        batch.req_pool_indices = batch.req_pool_indices[[row.index for row in fed]]
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
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([part.end for part in tokens])
        batch.seq_lens_sum = None
        batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        forward_batch = ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )
        self.draft_runner.model.see(batch.input_ids)
        hidden_states = self.draft_runner.forward(forward_batch).logits_output.hidden_states
        ends = torch.tensor(counts).cumsum(0) - 1  # [fed]
        return hidden_states[ends[[row.draft > 0 for row in fed]]]

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

    def _drafts(
        self, bonus_tokens: torch.Tensor, drafting: list[Row], hidden_states: torch.Tensor
    ) -> EagleDraftInput:
        """What SGLang carries to the next step: the first drafts, or zeros where there is none.

        Shapes: bonus_tokens [N], hidden_states [drafting, D] after each one's last token
        """
        N, D = len(bonus_tokens), hidden_states.shape[1]
        draft = EagleDraftInput(
            bonus_tokens=bonus_tokens,
            topk_index=torch.zeros(N, 1, dtype=torch.int64),
            topk_p=torch.ones(N, 1),
            hidden_states=hidden_states.new_zeros(N, D),
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
        if drafting:
            index = [row.index for row in drafting]
            draft.topk_index[index, 0] = self.draft_runner.model.get_top_tokens(hidden_states)
            draft.hidden_states[index] = hidden_states
        return draft
