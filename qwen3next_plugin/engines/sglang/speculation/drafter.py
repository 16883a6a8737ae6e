"""Drafter: chains of drafts from the int8 head, or none if drafting is slower.

Replaces SGLang's EagleDraftWorker, which runs the MTP layer over all verified tokens, rejected ones
included, and computes logits of the whole vocabulary for each, even if nothing is drafted. SGLang
still loads the layer and manages its cache. mtp/loop.py chooses when and how much to draft.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_disagg, get_parallel, get_schedule
from sglang.srt.speculative.eagle_info import EagleDraftInput

from qwen3next_plugin import env
from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.engines.sglang.speculation import batches
from qwen3next_plugin.engines.sglang.speculation.chains import Chains
from qwen3next_plugin.mtp.loop import Loop, usable_drafts
from qwen3next_plugin.mtp.metrics import Board, Observer
from qwen3next_plugin.mtp.policy import make_policy
from qwen3next_plugin.mtp.rows import FinishedStep, Row


class Drafter(Chains):
    """Drafts chains of the fastest length; one per worker."""

    def __init__(self, runner: Any, req_to_token_pool: Any, num_drafts: int) -> None:
        """`runner`: SGLang's model runner of the MTP layer, after loading."""
        super().__init__(runner, req_to_token_pool)
        chunk, whole = get_schedule().chunked_prefill_size, get_schedule().max_prefill_tokens
        limit = chunk if chunk > 0 else whole
        mode = get_disagg().disaggregation_mode
        # A prompt is handed over with the layer's KV, so the layer must read every token.
        must_run = mode == "prefill"
        self.loop = Loop(
            observer=Observer(make_policy(num_drafts), Board(num_drafts), logger.error),
            ranks=get_parallel().tp_group,
            max_tokens=sys.maxsize if must_run else limit,
            step_seconds=env.step_seconds() if runner.device == "cpu" else 0.0,
            usable_drafts=self._usable_drafts,
            must_run=must_run,
        )
        self.resumes = mode == "decode"  # retracted requests; other servers read them anew
        self.decoding: dict[str, Req] = {}  # requests of the last step that decoded
        self.read: dict[str, Req] = {}  # those whose prompts were read since that step
        self.chunked: Req | None = None  # the one of them whose prompt continues
        self.plain_reqs: list[Req] | None = None  # the batch of the last plain step
        runner.model.make_draft_head()
        # SGLang's image positions require the same number of tokens for every request.
        runner.model_config.model_is_mrope = False

    def has_drafts(self, batch: ScheduleBatch) -> bool:
        """Whether a request of the batch has a draft to verify."""
        return any(request.rid in self.lengths for request in batch.reqs)

    def drop(self, batch: ScheduleBatch) -> None:
        """Forget the drafts of a batch."""
        for request in batch.reqs:
            self.lengths.pop(request.rid, None)

    def after_prompts(
        self, batch: ScheduleBatch, hidden_states: torch.Tensor, next_token_ids: torch.Tensor
    ) -> EagleDraftInput:
        """Process T tokens of prompts, without drafts. Shapes: hidden_states [T, D].

        On a prefill server the MTP layer reads the prompts now, because their KV is handed over.
        Elsewhere it reads a prompt when the request first drafts.
        """
        going_on = {rid: request for rid, request in self.read.items() if not request.finished()}
        self.read = going_on | {request.rid: request for request in batch.reqs}
        self.chunked = batch.chunked_req
        self.lengths = {rid: n for rid, n in self.lengths.items() if rid not in self.read}
        step = batches.read(batch, hidden_states, next_token_ids)
        if fed := self.loop.step(step, self.decoding.keys() | self.read.keys(), None):
            self._forward(batch, fed)
            self._free()
        return self._drafts(next_token_ids, [], hidden_states[:0], hidden_states[:0])

    def after_verification(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        widths: Sequence[int],
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> EagleDraftInput:
        """First drafts after a verification of `widths` tokens of each request.

        `draft_seconds`: time of the drafting before it
        """
        step = batches.verified(batch, result, widths, self.lengths)
        fed = self._end_step(batch, step, step_seconds, draft_seconds)
        return self._first_drafts(batch, fed, result.next_draft_input.bonus_tokens, result)

    def after_plain_step(
        self,
        batch: ScheduleBatch,
        result: GenerationBatchResult,
        *,
        step_seconds: float,
        draft_seconds: float,
    ) -> EagleDraftInput | None:
        """First drafts after a step without drafts; None if none are due."""
        token_ids = result.next_token_ids.long()
        if self.loop.plain is not None and batch.reqs is self.plain_reqs:
            hidden_states = result.logits_output.hidden_states
            fed = self.loop.plain_step(token_ids, hidden_states, step_seconds)
        else:
            step = batches.decoded(batch, result)
            fed = self._end_step(batch, step, step_seconds, draft_seconds)
            self.plain_reqs = batch.reqs
        return self._first_drafts(batch, fed, token_ids, result) if fed else None

    def _end_step(
        self, batch: ScheduleBatch, step: FinishedStep, step_seconds: float, draft_seconds: float
    ) -> list[Row]:
        """Report a step and the drafting before it; both without times if a request is new."""
        requests = {request.rid: request for request in batch.reqs}
        timed = requests.keys() <= self.decoding.keys()
        self.decoding = requests
        self.read = {rid: request for rid, request in self.read.items() if request is self.chunked}
        self.loop.drafted(draft_seconds, draft_seconds if timed else None)
        if self.resumes:
            self._lose_retracted(batch, step)
        known = requests.keys() | self.read.keys()  # without retracted ones, which are read anew
        return self.loop.step(step, known, step_seconds if timed else None)

    def _lose_retracted(self, batch: ScheduleBatch, step: FinishedStep) -> None:
        """Stop drafting for resumed requests, because SGLang does not save the MTP layer's KV."""
        rows = zip(batch.reqs, step.firsts, strict=True)
        if resumed := {request.rid: first for request, first in rows if request.retraction_count}:
            self.loop.keep_plain()
            for rid, first in resumed.items():
                self.loop.pending.lose(rid, first)

    def _usable_drafts(self, request: str, computed: int) -> int:
        of_host = self.decoding[request]
        end = len(of_host.origin_input_ids) + of_host.sampling_params.max_new_tokens
        return usable_drafts(end, computed)

    def _first_drafts(
        self,
        batch: ScheduleBatch,
        fed: list[Row],
        bonus_tokens: torch.Tensor,
        result: GenerationBatchResult,
    ) -> EagleDraftInput:
        """Run the MTP layer on the rows' tokens. Shapes: bonus_tokens [N], each request's last."""
        hidden_states = states = result.logits_output.hidden_states[:0]
        if fed:
            hidden_states, states = self._forward(batch, fed)
        drafting = [row for row in fed if row.draft]
        drafts = self._drafts(bonus_tokens, drafting, hidden_states, states)
        self.lengths = {row.request: row.draft for row in drafting}
        self._free()
        return drafts

    def _free(self) -> None:
        for row in self.loop.rows:
            row.free_hidden_states()
