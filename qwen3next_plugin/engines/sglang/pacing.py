"""SGLang's steps of prompts within a budget of seconds, decode steps between them, and turns.

SGLang runs a step of prompts whenever it can, and reads one prompt in chunks to its end. Until
that end no request decodes, and no other prompt begins. Here a decode step follows each step of
prompts, engines/pacing.py chooses the chunks, and a partly read prompt may be set aside for a much
shorter one. It keeps its row, its page and its tokens, as between two chunks.

A chunk waits while rows decode and memory does not hold both. If it does not hold the rows' next
step, the partly read prompt that came last is retracted: it waits, and is read again.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from qwen3next_plugin import env
from qwen3next_plugin.engines.pacing import UNIT, LongestStep, Pacing, Prompt
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.engines.sglang.shared_prefixes import LEAST, next_place

MUCH_SHORTER = 4  # times
LOOKED_UP = 16  # waiting prompts whose cached prefix is looked up before a step

logger = logging.getLogger(__name__)


class Turns:
    """Chooses the prompts of the next step; one per scheduler."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.longest, self.longest_seconds = LongestStep(), 0.0
        self.pacing = Pacing(env.step_seconds() if _may_pace(scheduler) else 0.0, self._agree)
        self.aside: list[Any] = []  # partly read requests, except the scheduler's chunked_req

    def _agree(self, tokens: int) -> int:
        from sglang.srt.runtime_context import get_parallel

        group = get_parallel().tp_group
        if group.world_size == 1:
            return tokens
        return int(group.broadcast(torch.tensor([tokens]), src=0))

    def observe(self, rows: int, chunks: list[tuple[int, int]], seconds: float) -> None:
        """Record a step that decoded so many rows, or read chunks: (tokens, tokens before)."""
        self.longest_seconds = self.longest.observe(time.monotonic(), seconds)
        tokens = sum(count for count, _ in chunks)
        positions = sum(count * (start + count // 2) for count, start in chunks)
        self.pacing.costs.observe(rows, tokens, positions / max(1, tokens), seconds)

    def begin(self, rows: int) -> int | None:
        """Choose the next prompt to read; returns the step's tokens, None: SGLang's own chunk.

        A chunk ends where a page of its prompt is to be kept.
        """
        scheduler, parts = self.scheduler, self._parts()
        waiting = self._may_begin(parts)
        prompts = [Prompt(_rest(req), req.prefix_len) for req in parts]
        prompts += [self._waiting(req, i < LOOKED_UP) for i, req in enumerate(waiting)]
        most = scheduler.chunked_prefill_size
        shares = self.pacing.shares(prompts, rows, most)
        first = 0 if shares is None else self.pacing.first
        scheduler.chunked_req = parts[first] if first < len(parts) else None
        self.aside = [req for i, req in enumerate(parts) if i != first]
        if not prompts:
            return None
        req, context = (parts + waiting)[first], prompts[first].context
        place = self._place(req, context, begun=first < len(parts))
        if shares is None:
            return place and min(place - context, most)
        if first >= len(parts):
            scheduler.waiting_queue.remove(req)
            scheduler.waiting_queue.insert(0, req)
        end = min(context + most - context % most, place or math.inf)
        limit = self.pacing.limit
        return min(limit, end - context) if context + shares[first] > end else limit

    def _parts(self) -> list[Any]:
        """Partly read requests, the oldest first."""
        parts = self.aside + [r for r in (self.scheduler.chunked_req,) if r is not None]
        return sorted(parts, key=lambda req: req.time_stats.wait_queue_entry_time)

    def _place(self, req: Any, context: int, *, begun: bool) -> int | None:
        """Where to keep the next page of a prompt; not close to the cached one that it begins at.

        SGLang may still reorder waiting prompts, unless they are read in order of arrival.
        """
        if not self._shares_prefixes():
            return None
        if begun:
            return next_place(req, context)
        if req.session is not None or not _in_order_of_arrival(self.scheduler):
            return None
        return next_place(req, context + LEAST - 1)

    def _may_begin(self, parts: list[Any]) -> list[Any]:
        """Waiting requests to read next: all, or much shorter ones if some are partly read."""
        scheduler = self.scheduler
        if not _in_order_of_arrival(scheduler):
            return [] if parts else scheduler.waiting_queue[:1]
        most = min(map(_rest, parts), default=None)
        return [
            req
            for req in scheduler.waiting_queue
            if most is None or MUCH_SHORTER * len(req.origin_input_ids) <= most
        ]

    def _waiting(self, req: Any, look_up: bool) -> Prompt:
        """A waiting request's prompt, behind its cached prefix if that is looked up."""
        from sglang.srt.mem_cache.common import match_kv_cache

        tokens = len(req.origin_input_ids) + len(req.output_ids)
        if look_up and req.session is None and self._shares_prefixes():
            match_kv_cache(req, self.scheduler.tree_cache)
        computed = min(req.num_matched_prefix_tokens, tokens - 1)
        return Prompt(tokens - computed, computed)

    def _shares_prefixes(self) -> bool:
        return self.scheduler.tree_cache.supports_prefix_sharing()

    def may_continue(self, limit: int, running_batch: Any) -> bool:
        """Whether memory holds the next chunk and the rows' next step; SGLang never asks this.

        Without rows, which free memory when they end, requests set aside are retracted.
        """
        scheduler, req = self.scheduler, self.scheduler.chunked_req
        if req is None:  # SGLang asks before it begins a prompt
            return True
        tokens = min(limit, _rest(req)) + scheduler.page_size
        if running_batch.reqs:
            tokens += running_batch.new_tokens_required_next_decode()
        while not scheduler.token_to_kv_pool_allocator.check_decode_capacity(
            num_tokens=tokens, tree_cache=scheduler.tree_cache
        ):
            if running_batch.reqs or not self.aside:
                return not running_batch.reqs
            self.retract(self.aside[-1:])
        return True

    def make_room(self, running_batch: Any) -> None:
        """Retract partly read requests, the youngest first, until the rows' next step fits."""
        parts, tracker = self._parts(), self.scheduler.new_token_ratio_tracker
        while parts and not running_batch.check_decode_mem():
            logger.warning("memory is full: a prompt is read again: %s", parts[-1].rid)
            self.retract([parts.pop()])
            tracker.current = tracker.estimate_new_token_ratio_after_retract(running_batch.reqs)

    def retract(self, parts: list[Any]) -> None:
        """Free the memory of partly read requests, which wait again."""
        from sglang.srt.managers.schedule_batch import retract_all

        scheduler = self.scheduler
        self.aside = [req for req in self.aside if req not in parts]
        if scheduler.chunked_req in parts:
            scheduler.chunked_req = None
        retract_all(
            reqs=parts,
            req_to_token_pool=scheduler.req_to_token_pool,
            token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
            tree_cache=scheduler.tree_cache,
            hisparse_coordinator=None,
            offload_kv=False,
        )
        for req in parts:
            scheduler._add_request_to_queue(req)


def _may_pace(scheduler: Any) -> bool:
    """Whether this scheduler both reads prompts, in chunks, and decodes, without other servers."""
    from sglang.srt.disaggregation.utils import DisaggregationMode

    return (
        scheduler.disaggregation_mode == DisaggregationMode.NULL
        and scheduler.chunked_prefill_size is not None
        and scheduler.truncation_align_size is None
        and not scheduler.require_mlp_sync
    )


def _in_order_of_arrival(scheduler: Any) -> bool:
    return scheduler.schedule_policy == "fcfs" and not scheduler.enable_priority_scheduling


def _rest(req: Any) -> int:
    return len(req.full_untruncated_fill_ids) - req.prefix_len


def turns(scheduler: Any) -> Turns:
    """The turns of a scheduler."""
    if not hasattr(scheduler, "qwen3next_turns"):
        scheduler.qwen3next_turns = Turns(scheduler)
    return scheduler.qwen3next_turns


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.run_batch",
    reason="SGLang does not learn what steps take",
    remove_when="SGLang bounds the time of a step",
)
def time_step(
    host: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **options: Any
) -> Any:
    """Around `run_batch`: learn how long steps take."""
    reads = batch.forward_mode.is_extend()
    rows = 0 if reads else len(batch.reqs)
    chunks = [(req.extend_len, req.prefix_len) for req in batch.reqs] if reads else []
    began = time.perf_counter()
    result = host(scheduler, batch, *args, **options)
    turns(scheduler).observe(rows, chunks, time.perf_counter() - began)
    return result


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler._get_new_batch_prefill_raw",
    reason="SGLang reads prompts chunk by chunk before anybody decodes, each chunk as large as "
    "fits memory, and one prompt to its end before another begins",
    remove_when="SGLang bounds the time of a step",
)
def read_prompts(
    host: Callable[..., Any], scheduler: Any, *, running_batch: Any, **options: Any
) -> Any:
    """Around `_get_new_batch_prefill_raw`: the batch of prompts that fits the budget, if any."""
    found = turns(scheduler)
    rows = sum(not req.finished() for req in running_batch.reqs)
    last = scheduler.last_batch
    if not found.pacing.seconds:
        return host(scheduler, running_batch=running_batch, **options)
    if rows and last is not None and last.forward_mode.is_extend():
        return None, running_batch  # a decode step is next
    most = scheduler.chunked_prefill_size
    # SGLang subtracts the rows that decode in the same step, without regard to what is left.
    mixed = len(running_batch.reqs) if scheduler.is_mixed_chunk else 0
    try:
        limit = found.begin(rows) or max(UNIT, most - mixed)
        scheduler.chunked_prefill_size = limit + mixed
        batch = None
        if found.may_continue(limit, running_batch):
            batch, running_batch = host(scheduler, running_batch=running_batch, **options)
        if batch is None and scheduler.chunked_req is None and found.aside:
            scheduler.chunked_req = found.aside.pop(0)  # the chosen one found no room
            if found.may_continue(limit, running_batch):
                batch, running_batch = host(scheduler, running_batch=running_batch, **options)
    finally:
        scheduler.chunked_prefill_size = most
    return batch, running_batch


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.update_running_batch",
    reason="SGLang ends the last row where prompts that are read in part hold the memory",
    remove_when="SGLang reads several prompts in part",
)
def keep_rows(host: Callable[..., Any], scheduler: Any, batch: Any) -> Any:
    """Around `update_running_batch`: retract partly read prompts before any row."""
    if turns(scheduler).pacing.seconds:
        turns(scheduler).make_room(batch)
    return host(scheduler, batch)


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class",
    reason="SGLang knows one prompt that is read in part",
    remove_when="SGLang reads several prompts in part",
)
def reserve(host: Callable[..., Any], scheduler: Any) -> Callable[..., Any]:
    """Around `get_prefill_adder_class`: keep memory free for the requests set aside."""
    made = host(scheduler)

    def make(*args: Any, **options: Any) -> Any:
        adder = made(*args, **options)
        adder.memory_budget.total_offset += sum(map(_rest, turns(scheduler).aside))
        return adder

    return make


@patch(
    When.ON_CPU,
    "sglang.srt.managers.schedule_policy.PrefillAdder._select_prefill_admission",
    reason="SGLang knows one prompt that is read in part",
    remove_when="SGLang reads several prompts in part",
)
def keep_whole(
    host: Callable[..., Any], adder: Any, req: Any, *, has_chunked_req: bool = False, **options: Any
) -> Any:
    """Around `_select_prefill_admission`: begin no second partly read prompt."""
    from sglang.srt.managers.schedule_policy import AddReqResult

    admission = host(adder, req, has_chunked_req=has_chunked_req, **options)
    if has_chunked_req and getattr(admission, "is_chunked", False):
        return AddReqResult.OTHER
    return admission


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.stash_chunked_request",
    reason="SGLang keeps a page for each chunk, of which there would be too many",
    remove_when="SGLang bounds the time of a step",
)
def publish_at_ends(host: Callable[..., None], scheduler: Any, req: Any) -> None:
    """Around `stash_chunked_request`: cache a page where SGLang's chunks end, and at places.

    Pages of all the small chunks of a budget would evict other prompts' pages.
    """
    if not turns(scheduler).pacing.seconds:
        return host(scheduler, req)
    most = scheduler.chunked_prefill_size
    ends = req.prefix_len // most != req.extend_end // most
    if ends or next_place(req, req.prefix_len) == req.extend_end:
        return host(scheduler, req)
    barred, req.skip_radix_cache_insert = req.skip_radix_cache_insert, True
    try:
        host(scheduler, req)
    finally:
        req.skip_radix_cache_insert = barred


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.abort_request",
    reason="SGLang knows one prompt that is read in part",
    remove_when="SGLang reads several prompts in part",
)
def end_aside(host: Callable[..., None], scheduler: Any, asked: Any) -> None:
    """Around `abort_request`: also abort requests set aside, which wait again for that."""
    found = turns(scheduler)
    found.retract([r for r in found.aside if asked.abort_all or r.rid.startswith(asked.rid)])
    host(scheduler, asked)


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.pause_generation",
    reason="SGLang knows one prompt that is read in part",
    remove_when="SGLang reads several prompts in part",
)
def retract_aside(host: Callable[..., None], scheduler: Any, asked: Any) -> None:
    """Around `pause_generation`: also retract the requests set aside."""
    if asked.mode == "retract":
        turns(scheduler).retract(turns(scheduler).aside)
    host(scheduler, asked)
