"""Drafter: chains of drafts from the int8 head, and none at all when drafts do not pay.

Replaces the passes of SGLang's EagleDraftWorker over a chain. SGLang runs the MTP layer over all
verified tokens, the rejected ones too, computes logits of the whole vocabulary for each, and does
so even if nothing is drafted. SGLang still loads the layer, manages its cache, and drafts trees
(topk > 1) by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel, get_schedule
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_utils import _eagle_prefill_tail_tokens

from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.engines.sglang.speculation.chains import Chains
from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.pending import Pending, PendingTokens, Row, choose_lengths
from qwen3next_plugin.mtp.plain_steps import PlainSteps, wait_after
from qwen3next_plugin.mtp.policy import Policy, make_policy


class Drafter(Chains):
    """Chains of the length that pays; one per worker. `begin` follows its construction."""

    policy: Policy
    observer: Observer
    pending: Pending
    limit: int  # tokens that one pass of the MTP layer reads
    rows: list[Row]  # of the last step, if the drafter has looked at it
    plain: PlainSteps | None  # those that it has not looked at
    plain_reqs: list[Req]  # of these steps
    wait: int  # plain steps until it looks at them, whether the batch changes or not
    idle: int  # plain steps since the last draft
    decoded: set[str]  # requests of the last step that decoded
    read: dict[str, Req]  # those whose prompts were read since the last step
    chunked: Req | None  # the one of them whose prompt goes on

    def begin(self) -> None:
        """Add what is ours to a draft worker that SGLang has built."""
        self.policy = make_policy(self.speculative_num_steps)
        self.observer = Observer(self.policy, Board(self.speculative_num_steps), logger.error)
        self.pending = Pending()
        chunk, whole = get_schedule().chunked_prefill_size, get_schedule().max_prefill_tokens
        self.limit = chunk if chunk > 0 else whole
        self.rows, self.plain, self.plain_reqs = [], None, []
        self.wait, self.idle, self.decoded = 0, 0, set()
        self.lengths = {}
        self.read, self.chunked = {}, None
        self.draft_runner.model.make_draft_head()
        # SGLang's positions of images need as many tokens of one request as of another.
        self.draft_runner.model_config.model_is_mrope = False

    def has_drafts(self, batch: ScheduleBatch) -> bool:
        """Whether a request of the batch has a draft to verify."""
        return any(request.rid in self.lengths for request in batch.reqs)

    def learn(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        widths: Sequence[int],
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> None:
        """Learn from a verification of `widths` tokens of each request, and the drafts before it.

        Then choose the lengths of the next.
        """
        self.keep()
        self.plain, self.wait, self.idle = None, 0, 0
        rows = self._verified_rows(batch, result, widths)
        timed = self._end_drafts(batch, draft_seconds)
        self.observer.observe_step(rows, step_seconds if timed else None)
        lengths = self._lengths([row.request for row in rows])
        for row, length, request in zip(rows, lengths, batch.reqs, strict=True):
            row.draft = min(length, room(request, len(row.tokens)))
        self.rows = rows

    def learn_plain(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> EagleDraftInput | None:
        """Learn from a step without drafts; the first drafts, if it is time for some.

        Most of these steps are only kept. The drafter looks at them every few steps: where many
        requests come and go, to do so at each change would take longer than drafts gain.
        """
        timed = True
        same = self.plain is not None and self.plain_reqs is batch.reqs
        if not same or self.rows:
            timed = self._end_drafts(batch, draft_seconds)
        if self.plain is None or not same:
            self.keep()
            requests = [request.rid for request in batch.reqs]
            firsts = (batch.seq_lens - 1).tolist()
            self.plain = PlainSteps(requests, firsts, self.observer, self.pending)
            self.plain_reqs = batch.reqs
        self.plain.add(
            result.next_token_ids.long(),
            result.logits_output.hidden_states,
            step_seconds if timed else None,
        )
        self.wait, self.idle = self.wait - 1, self.idle + 1
        return self._look(batch, self.plain) if self.wait <= 0 else None

    def _look(self, batch: ScheduleBatch, plain: PlainSteps) -> EagleDraftInput | None:
        """Learn from the plain steps so far, the last of which has just ended; draft if it pays."""
        token_ids = plain.token_ids[-1]

        def choose(requests: Sequence[str], more: int) -> list[int]:
            lengths = self._lengths(requests, more)
            return [min(n, room(one, 1)) for n, one in zip(lengths, batch.reqs, strict=True)]

        self.rows = plain.look(choose)
        self.wait = wait_after(self.idle)
        if not self.rows:
            return None
        self.idle = 0
        drafts = self._first_drafts(batch, token_ids)
        if not self.lengths:
            self.wait = 1  # it has not caught up yet, and goes on after the next step
        return drafts

    def keep(self) -> None:
        """Keep the plain steps so far for the MTP layer, without choosing lengths."""
        if self.plain is not None:
            self.plain.keep()

    def _end_drafts(self, batch: ScheduleBatch, seconds: float) -> bool:
        """Report drafting before this step; whether no step since the last read its prompts."""
        requests = {request.rid for request in batch.reqs}
        timed, self.decoded = requests <= self.decoded, requests
        if self.rows:
            passes_seconds = seconds if timed else None
            self.observer.observe_draft(self.rows, passes_seconds=passes_seconds, seconds=seconds)
        self.rows = []
        return timed

    def _verified_rows(
        self, batch: ScheduleBatch, result: GenerationBatchResult, widths: Sequence[int]
    ) -> list[Row]:
        """The rows of a verification, with their committed tokens as the MTP layer reads them."""
        token_ids = result.next_token_ids.long().split(list(widths))
        hidden_states = result.logits_output.hidden_states.split(list(widths))
        parts = zip(batch.seq_lens.tolist(), token_ids, hidden_states, strict=True)
        counts = result.accept_lens.tolist()  # without the rejected drafts
        return [
            Row(
                request=request.rid,
                index=i,
                tokens=PendingTokens(*part).head(count),
                scheduled=1 + self.lengths.get(request.rid, 0),
                continues=True,
            )
            for i, (request, part, count) in enumerate(zip(batch.reqs, parts, counts, strict=True))
        ]

    def _keep_known(self) -> None:
        """Forget requests that have ended; those that were retracted are read anew."""
        known = self.decoded | self.read.keys()
        self.observer.keep_only(known)
        self.pending.keep_only(known)

    def _lengths(self, requests: Sequence[str], more: int = 0) -> list[int]:
        self.read = {rid: request for rid, request in self.read.items() if request is self.chunked}
        self._keep_known()
        ranks = get_parallel().tp_group
        return choose_lengths(self.policy, self.pending, requests, more, ranks)

    def _draft_extend_for_prefill(
        self,
        batch: ScheduleBatch,
        target_hidden_states: torch.Tensor,
        next_token_ids: torch.Tensor,
        mm_input_embeds: torch.Tensor | None = None,
        kv_loc_plan: Any = None,
    ) -> EagleDraftInput:
        """Keep prompts for the MTP layer: it reads those of requests that draft later."""
        self.keep()
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
        self.lengths = {rid: n for rid, n in self.lengths.items() if rid not in self.read}
        self._keep_known()
        self.pending.put(rows)
        return self._drafts(next_token_ids, [], target_hidden_states[:0])

    def _draft_extend_for_decode(
        self, batch: ScheduleBatch, batch_result: GenerationBatchResult, *, kv_loc_plan: Any = None
    ) -> None:
        """Make first drafts after a verification."""
        bonus_tokens = batch_result.next_draft_input.bonus_tokens
        batch_result.next_draft_input = self._first_drafts(batch, bonus_tokens)

    def _first_drafts(self, batch: ScheduleBatch, bonus_tokens: torch.Tensor) -> EagleDraftInput:
        """Run the MTP layer for the rows that draft; their first drafts."""
        hidden_states = self.rows[0].tokens.hidden_states[:0]
        if fed := self.pending.feed(self.rows, self.limit):
            hidden_states = self._forward(batch, fed)
        drafting = [row for row in fed if row.draft]
        drafts = self._drafts(bonus_tokens, drafting, hidden_states)
        self.lengths = {row.request: row.draft for row in drafting}
        for row in self.rows:
            row.free_hidden_states()
        return drafts


def room(request: Req, tokens: int) -> int:
    """How many drafts a request can use after a step of so many tokens; the next adds its own."""
    left = request.sampling_params.max_new_tokens - len(request.output_ids) - tokens
    return max(0, left - 1)
