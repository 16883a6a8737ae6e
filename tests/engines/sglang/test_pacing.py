"""Turns of prompts that are read in part, without a server."""

from collections import Counter
from types import SimpleNamespace as Bag

import pytest
from sglang.srt.managers import schedule_batch
from sglang.srt.managers.scheduler_components.new_token_ratio_tracker import NewTokenRatioTracker

from qwen3next_plugin.engines.pacing import FIRST, Pacing, Prompt
from qwen3next_plugin.engines.sglang import pacing
from qwen3next_plugin.engines.sglang.pacing import Turns

CHUNK = 4096
END = 1  # the token that ends a message


class Request:
    def __init__(self, name, tokens, at):
        self.rid, self.session = name, None
        self.origin_input_ids, self.output_ids = [0] * tokens, []
        self.full_untruncated_fill_ids = self.origin_input_ids
        self.prefix_len = self.num_matched_prefix_tokens = 0
        self.mamba_branching_seqlen, self.eos_token_ids = None, {END}
        self.skip_radix_cache_insert = self.return_hidden_states = False
        self.time_stats = Bag(wait_queue_entry_time=at)

    @property
    def rest(self):
        return len(self.origin_input_ids) - self.prefix_len

    def finished(self):
        return False


class Scheduler:
    """What SGLang's does of steps of prompts: one part at most, then whole ones."""

    def __init__(self, *waiting, policy="fcfs"):
        self.waiting_queue = list(waiting)
        self.chunked_req, self.chunked_prefill_size, self.last_batch = None, CHUNK, None
        self._pending_chunked_abort_req = None
        self.schedule_policy, self.enable_priority_scheduling = policy, False
        self.tree_cache = Bag(supports_prefix_sharing=lambda: True)
        self.full = self.is_mixed_chunk = False
        self.page_size, self.room, self.retracted = 1, 10**6, []
        self.req_to_token_pool, self.token_to_kv_pool_allocator = None, self
        self.new_token_ratio_tracker = NewTokenRatioTracker(
            init=0.4, min=0.1, decay=0.01, current=0.1
        )
        self.qwen3next_turns = turns = Turns.__new__(Turns)
        turns._waiting = lambda req, look_up: Prompt(req.rest, req.prefix_len)
        turns.scheduler, turns.pacing, turns.aside = self, Pacing(1.0), []

    def read(self, *, running_batch):
        left, read = self.chunked_prefill_size, Counter()
        if self.is_mixed_chunk:
            left -= len(running_batch.reqs)
        parts = [req for req in (self.chunked_req,) if req is not None]
        for req in [*parts, *([] if self.full else self.waiting_queue)]:
            if left and (req.rest <= left or self.chunked_req in (None, req)):
                read[req.rid] = min(req.rest, left)
                left -= read[req.rid]
                req.prefix_len += read[req.rid]
                self.chunked_req = req if req.rest else None
        self.waiting_queue = [req for req in self.waiting_queue if not req.prefix_len]
        return read or None, running_batch

    def check_decode_capacity(self, *, num_tokens, tree_cache):
        return num_tokens <= self.room

    def _add_request_to_queue(self, req):
        self.waiting_queue.append(req)

    def step(self, rows=1):
        return pacing.read_prompts(Scheduler.read, self, running_batch=self.batch(rows))[0]

    def batch(self, rows):
        return Bag(
            reqs=[Request("row", 1, 0)] * rows,
            batch_is_full=False,
            new_tokens_required_next_decode=lambda: rows,
            check_decode_mem=lambda: rows <= self.room,
        )


def test_rows_that_decode_in_the_same_step_take_no_tokens_from_prompts():
    scheduler = Scheduler(Request("long", 8000, 0))
    scheduler.is_mixed_chunk = True
    assert scheduler.step(rows=FIRST + 9) == {"long": FIRST}
    scheduler.chunked_prefill_size = CHUNK
    assert scheduler.step(rows=0) == {"long": CHUNK}


def test_a_decode_step_follows_each_step_of_prompts():
    scheduler = Scheduler(Request("long", 8000, 0))
    assert scheduler.step() == {"long": FIRST}
    scheduler.last_batch = Bag(forward_mode=Bag(is_extend=lambda: True))
    assert scheduler.step() is None
    assert scheduler.step(rows=0) == {"long": CHUNK}  # nobody decodes
    scheduler.last_batch = Bag(forward_mode=Bag(is_extend=lambda: False))
    assert scheduler.step() == {"long": FIRST}
    assert scheduler.chunked_prefill_size == CHUNK


def test_a_long_prompt_stands_aside_for_a_short_one_every_second_step():
    scheduler = Scheduler(Request("long", 8000, 0))
    scheduler.step()
    scheduler.waiting_queue.append(Request("short", 150, 1))
    steps = [scheduler.step() for _ in range(6)]
    assert [step.get("short", 0) for step in steps] == [64, 0, 64, 0, 22, 0]
    assert [step.get("long", 0) for step in steps] == [0, 64, 0, 64, 0, 64]
    scheduler.waiting_queue.append(Request("other", 60, 1))
    assert scheduler.step() == {"other": 60}


def test_one_that_is_not_much_shorter_waits_for_the_end():
    scheduler = Scheduler(Request("long", 600, 0), Request("next", 200, 1))
    steps = [scheduler.step() for _ in range(13)]
    assert sum(steps, Counter()) == {"long": 600, "next": 200}
    names = [name for step in steps for name in step]
    assert names == sorted(names)
    assert all(sum(step.values()) == FIRST for step in steps[:-1])


def test_no_turns_in_another_order_than_of_arrival():
    scheduler = Scheduler(Request("long", 8000, 0), policy="lpm")
    scheduler.step()
    scheduler.waiting_queue.append(Request("short", 30, 1))
    assert [scheduler.step() for _ in range(3)] == [{"long": FIRST}] * 3


def test_who_finds_no_room_holds_nobody_up():
    scheduler = Scheduler(Request("long", 8000, 0))
    scheduler.step()
    scheduler.waiting_queue.append(Request("short", 30, 1))
    scheduler.full = True
    assert [scheduler.step() for _ in range(4)] == [{"long": FIRST}] * 4
    assert scheduler.qwen3next_turns.aside == []


def test_chunks_end_where_states_are_kept():
    scheduler = Scheduler(long := Request("long", 8000, 0))
    long.prefix_len = CHUNK - 16
    scheduler.chunked_req, scheduler.waiting_queue = long, []
    assert scheduler.step() == {"long": 16}
    kept = []

    def host(_, req):
        kept.append(not req.skip_radix_cache_insert)

    for start, end in ((0, 64), (CHUNK - 16, CHUNK), (CHUNK, CHUNK + 64), (100, 2 * CHUNK)):
        part = Request("part", 9000, 0)
        part.prefix_len, part.extend_end, part.skip_radix_cache_insert = start, end, False
        pacing.publish_at_ends(host, scheduler, part)
        assert not part.skip_radix_cache_insert
    assert kept == [False, True, False, True]


@pytest.mark.parametrize("rows", [0, 1])
def test_chunks_end_at_a_junction_and_behind_the_first_message(rows):
    scheduler, kept = Scheduler(req := Request("one", 1500, 0)), []
    req.origin_input_ids[699] = req.origin_input_ids[1400] = END
    req.mamba_branching_seqlen, req.prefix_len = 320, 100
    req.num_matched_prefix_tokens, ends = req.prefix_len, [req.prefix_len]

    def host(_, req):
        kept.append(not req.skip_radix_cache_insert)

    while req.rest:
        before, req.skip_radix_cache_insert = req.prefix_len, False
        scheduler.step(rows)
        req.prefix_len, req.extend_end = before, req.prefix_len
        pacing.publish_at_ends(host, scheduler, req)
        req.prefix_len = req.extend_end
        ends.append(req.prefix_len)
    places = [end for end, page in zip(ends[1:], kept, strict=True) if page]
    assert places == [320, 700]
    assert {*places} < {*ends}
    assert rows or ends == [100, 320, 700, 1500]


def test_a_place_beyond_a_chunk_does_not_lengthen_it():
    scheduler = Scheduler(req := Request("one", 20_000, 0))
    req.mamba_branching_seqlen = 2 * CHUNK + 640
    steps = [scheduler.step(rows=0)["one"] for _ in range(4)]
    assert steps == [CHUNK, CHUNK, 640, CHUNK]


def test_no_chunk_ends_close_to_a_cached_page_or_by_guess():
    req = Request("one", 1500, 0)
    req.mamba_branching_seqlen = req.num_matched_prefix_tokens = req.prefix_len = 320
    req.mamba_branching_seqlen += 63
    assert Scheduler(req).step(rows=0) == {"one": 1180}
    for name, value in {"session": "s", "skip_radix_cache_insert": True}.items():
        req = Request("one", 1500, 0)
        req.mamba_branching_seqlen = 320
        setattr(req, name, value)
        assert Scheduler(req).step(rows=0) == {"one": 1500}
    req = Request("one", 1500, 0)
    req.mamba_branching_seqlen = 320
    scheduler = Scheduler(req)
    scheduler.tree_cache = Bag(supports_prefix_sharing=lambda: False)
    assert scheduler.step(rows=0) == {"one": 1500}
    req = Request("one", 1500, 0)
    req.mamba_branching_seqlen = 320
    assert Scheduler(req, policy="lpm").step(rows=0) == {"one": 1500}


@pytest.fixture
def two_parts(monkeypatch):
    """A scheduler with two prompts read in part, the long one aside; retracting one frees 100."""

    def retract_all(*, reqs, **_):
        for req in reqs:
            scheduler.retracted.append(req.rid)
            scheduler.room, req.prefix_len = scheduler.room + 100, 0

    monkeypatch.setattr(schedule_batch, "retract_all", retract_all)
    scheduler = Scheduler(long := Request("long", 8000, 0), short := Request("short", 1500, 1))
    scheduler.step()
    scheduler.step()
    assert (scheduler.chunked_req, scheduler.qwen3next_turns.aside) == (short, [long])
    return scheduler


def test_a_chunk_waits_for_memory_while_rows_decode(two_parts):
    scheduler, chunk = two_parts, FIRST + 1  # a page more, since the prompt may end in one
    scheduler.room = chunk + 4
    assert scheduler.step(rows=5) is None
    assert scheduler.step(rows=4).total() == FIRST
    assert not scheduler.retracted


def test_without_rows_those_aside_give_way(two_parts):
    two_parts.room = 150
    assert two_parts.step(rows=0)
    assert len(two_parts.retracted) == 1
    two_parts.room = 0
    assert two_parts.step(rows=0)  # SGLang knows whether its only prompt fits


def test_rows_take_the_memory_of_the_youngest_prompt(two_parts):
    tracker, ran = two_parts.new_token_ratio_tracker, []
    for room, rows, retracted in ((9, 9, []), (9, 10, ["short"]), (0, 200, ["short", "long"])):
        two_parts.room = room
        batch = two_parts.batch(rows)
        for row in batch.reqs:
            row.sampling_params = Bag(max_new_tokens=40)
        pacing.keep_rows(lambda _, batch: ran.append(batch), two_parts, batch)
        assert two_parts.retracted == retracted
        assert (tracker.current > 0.1) == bool(retracted)
        assert ran[-1] is batch
    assert two_parts.chunked_req is None
    assert not two_parts.qwen3next_turns.aside
    assert [req.rid for req in two_parts.waiting_queue] == ["short", "long"]


def test_who_leaves_ends_its_request_aside_as_one_that_waits(two_parts):
    scheduler, seen = two_parts, []

    def host(scheduler, asked):
        seen.append([req.rid for req in scheduler.waiting_queue])

    for name, abort_all in (("short", False), ("long", False), ("", True)):
        pacing.end_aside(host, scheduler, Bag(rid=name, abort_all=abort_all))
    assert seen == [[], ["long"], ["long"]]
    assert scheduler.chunked_req.rid == "short"


def test_a_pause_retracts_those_aside_too(two_parts):
    scheduler, paused = two_parts, []
    long = scheduler.qwen3next_turns.aside[0]
    for mode in ("in_place", "retract"):
        pacing.retract_aside(lambda _, asked: paused.append(asked.mode), scheduler, Bag(mode=mode))
        aside = scheduler.qwen3next_turns.aside
        assert aside == ([long] if mode == "in_place" else [])
    assert paused == ["in_place", "retract"]
    assert scheduler.retracted == ["long"]
    assert scheduler.waiting_queue == [long]
