"""Which pending tokens the drafter keeps, of prompts and of requests that draft nothing."""

from types import SimpleNamespace as Bag

import pytest
import torch

pytest.importorskip("sglang")

from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.policy import Fixed

D = 2


class Request(Bag):
    """What the drafter reads of one."""

    def __init__(self, rid: str) -> None:
        super().__init__(rid=rid, ended=False)

    def finished(self) -> bool:
        return self.ended


@pytest.fixture
def drafter(monkeypatch):
    """A drafter that drafts nothing, with `read` for steps of prompts and `decode` for others."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.speculation import drafter as module

    monkeypatch.setattr(module, "get_parallel", lambda: Bag(tp_group=Bag(world_size=1)))
    drafter = object.__new__(module.Drafter)
    drafter.policy = Fixed(0)
    drafter.observer, drafter.pending, drafter.limit = Observer(drafter.policy), Pending(), 8
    drafter.rows, drafter.next_steps, drafter.drafting = [], 0, set()
    drafter.read, drafter.chunked = {}, None

    def read(first, count, *requests, chunked=None):
        N = len(requests)
        batch = Bag(
            reqs=list(requests),
            input_ids=torch.arange(N * count),
            prefix_lens=[first] * N,
            extend_lens=[count] * N,
            chunked_req=chunked,
            chunked_req_next_prompt_token=None if chunked is None else 7,
        )
        drafter._draft_extend_for_prefill(batch, torch.zeros(N * count, D), torch.zeros(N).long())

    def decode(at, *requests):
        N = len(requests)
        batch = Bag(reqs=list(requests), seq_lens=torch.full((N,), at))
        result = Bag(
            speculative_num_draft_tokens=1,
            next_token_ids=torch.zeros(N).long(),
            accept_lens=torch.ones(N).int(),
            logits_output=Bag(hidden_states=torch.zeros(N, D)),
            next_draft_input=Bag(bonus_tokens=torch.zeros(N).long()),
        )
        drafter.learn(batch, result, step_seconds=1.0, draft_seconds=0.0)
        drafter._draft_extend_for_decode(batch, result)
        assert drafter.steps(batch) == 0

    return Bag(read=read, decode=decode, count=drafter.pending.count)


def test_a_prompt_and_what_follows_it_wait(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, a, b)
    drafter.decode(5, a, b)
    drafter.decode(6, a, b)
    assert [drafter.count(rid) for rid in "ab"] == [7, 7]


def test_what_ended_is_dropped(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, a, b)
    drafter.decode(5, a, b)
    drafter.decode(6, b)
    assert [drafter.count(rid) for rid in "ab"] == [0, 7]


def test_an_unfinished_prompt_outlives_other_steps(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, b)
    drafter.read(0, 5, a, chunked=a)
    for at in (5, 6):
        drafter.decode(at, b)
    assert drafter.count("a") == 5
    drafter.read(5, 5, a)
    drafter.decode(7, b)  # it is aborted
    drafter.decode(8, b)
    assert drafter.count("a") == 0


def test_prompts_that_end_at_once_leave_nothing(drafter):
    """As where only their log-probabilities are asked for, so that no step decodes."""
    for rid in "abc":
        request = Request(rid)
        drafter.read(0, 5, request)
        request.ended = True
    assert [drafter.count(rid) for rid in "abc"] == [0, 0, 5]


def test_a_request_that_is_read_again_starts_afresh(drafter):
    a = Request("a")
    drafter.read(0, 5, a)
    drafter.decode(5, a)
    drafter.read(2, 4, a)  # retracted; its first two tokens were still cached
    assert drafter.count("a") == 4
