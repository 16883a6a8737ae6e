"""What the drafter keeps of prompts and of requests that draft nothing, and when it drafts."""

from types import SimpleNamespace as Bag

import pytest
import torch

pytest.importorskip("sglang")

from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.pending import Pending
from qwen3next_plugin.mtp.plain_steps import EVERY
from qwen3next_plugin.mtp.policy import Fixed

D = 2


class Request(Bag):
    """What the drafter reads of one."""

    def __init__(self, rid: str) -> None:
        super().__init__(
            rid=rid, ended=False, output_ids=[], sampling_params=Bag(max_new_tokens=99)
        )

    def finished(self) -> bool:
        return self.ended


@pytest.fixture
def drafter(monkeypatch):
    """A drafter, with `read` for steps of prompts and `decode` for others; it drafts `length`."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.speculation import drafter as module

    monkeypatch.setattr(module, "get_parallel", lambda: Bag(tp_group=Bag(world_size=1)))
    fed = {}  # request → (first position, tokens) of what the MTP layer read last

    def forward(self, batch, rows):
        fed.clear()
        fed.update({row.request: (row.fed.first, len(row.fed)) for row in rows})
        return torch.zeros(sum(row.draft > 0 for row in rows), D)

    monkeypatch.setattr(module.Drafter, "_forward", forward)
    drafter = object.__new__(module.Drafter)
    drafter.draft_runner = Bag(model=Bag(get_top_tokens=lambda h: torch.full((len(h),), 5)))
    drafter.observer, drafter.pending, drafter.limit = Observer(Fixed(0)), Pending(), 8
    drafter.rows, drafter.plain, drafter.decoded = [], None, set()
    drafter.wait = drafter.idle = 0
    drafter.lengths = {}
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

    def decode(at, *requests, length=0, same=None):
        """Verifies what was drafted, and accepts nothing; returns the most drafts of a request.

        `same`: the list of requests of the last step, where the batch is the same.
        """
        N = len(same or requests)
        drafter.policy = Fixed(length)
        batch = Bag(reqs=same or list(requests), seq_lens=torch.full((N,), at))
        widths = [1 + drafter.lengths.get(request.rid, 0) for request in batch.reqs]
        T = sum(widths)
        result = Bag(
            next_token_ids=torch.zeros(T).int(),
            accept_lens=torch.ones(N).int(),
            logits_output=Bag(hidden_states=torch.zeros(T, D)),
            next_draft_input=Bag(bonus_tokens=torch.zeros(N).long()),
        )
        seconds = {"step_seconds": 1.0, "draft_seconds": 0.0}
        if T > N:
            assert drafter.has_drafts(batch)
            drafter.learn(batch, result, widths, **seconds)
            drafter._draft_extend_for_decode(batch, result)
        else:
            batch.seq_lens += 1  # as SGLang prepares a plain step
            drafter.learn_plain(batch, result, **seconds)
        return max(widths) - 1

    return Bag(it=drafter, read=read, decode=decode, count=drafter.pending.count, fed=fed)


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


def test_a_prompt_is_read_after_the_step_that_follows_it(drafter):
    a = Request("a")
    drafter.read(0, 5, a)
    assert drafter.decode(5, a, length=3) == 0
    assert drafter.fed == {"a": (0, 6)}
    assert drafter.decode(6, a, length=0) == 3
    assert drafter.decode(7, a) == 0
    assert drafter.count("a") == 2


def test_a_long_prompt_is_read_in_slices_and_drafts_after_the_last(drafter):
    a = Request("a")
    drafter.read(0, 15, a)
    for at, fed in ((15, (0, 8)), (16, (8, 8)), (17, (16, 2))):
        assert drafter.decode(at, a, length=3) == 0
        assert drafter.fed == {"a": fed}
    assert drafter.decode(18, a, length=3) == 3


def test_whoever_has_no_draft_yet_verifies_one_token(drafter):
    a, b = Request("a"), Request("b")
    drafter.it.limit = 4
    drafter.read(0, 3, a)
    drafter.decode(3, a, length=3)
    drafter.read(0, 4, b)
    for fed, drafted in (({"a": (4, 1), "b": (0, 3)}, 3), ({"a": (5, 1), "b": (3, 3)}, 2)):
        assert drafter.decode(fed["a"][0], a, b, length=2) == drafted
        assert [row.scheduled for row in drafter.it.rows] == [1 + drafted, 1]
        assert drafter.fed == fed
    drafter.decode(6, a, b)
    assert [row.drafted for row in drafter.it.rows] == [2, 2]


def test_a_request_without_room_drafts_nothing(drafter):
    a, b = Request("a"), Request("b")
    drafter.it.pending.max_bytes = 6 * (8 + 4 * D)
    drafter.read(0, 5, a)
    drafter.read(0, 5, b)
    drafter.decode(5, a, b, length=3)
    assert drafter.fed == {"a": (0, 6)}
    assert drafter.decode(6, a, b, length=3) == 3
    assert [row.drafted for row in drafter.it.rows] == [3, 0]


def test_nothing_is_drafted_beyond_the_end_of_an_answer(drafter):
    ends, goes_on = Request("ends"), Request("goes on")
    ends.sampling_params.max_new_tokens = 5
    drafter.it.limit = 100
    drafter.read(0, 5, ends, goes_on)
    for at, drafts in ((5, 3), (6, 2), (7, 1), (8, None), (9, None)):
        drafter.decode(at, ends, goes_on, length=3)
        ends.output_ids.append(0)
        assert drafter.it.lengths.get("ends") == drafts
        assert drafter.it.lengths["goes on"] == 3


def test_plain_steps_are_looked_at_every_few_steps(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, a, b)
    drafter.it.idle = 4 * EVERY  # nothing was drafted for long
    both, at = [a, b], 5
    for kept in (6, *[6] * (EVERY - 1), 6 + EVERY, *[6 + EVERY] * 2):
        drafter.decode(at, same=both)
        at += 1
        assert [drafter.count(rid) for rid in "ab"] == [kept] * 2
    drafter.it.keep()
    assert [drafter.count(rid) for rid in "ab"] == [8 + EVERY] * 2
    drafter.it.limit = 100
    for _ in range(EVERY - 2):
        drafter.decode(at, same=both, length=3)
        at += 1
    assert drafter.fed == dict.fromkeys("ab", (0, 6 + 2 * EVERY))
    assert drafter.decode(at, same=both) == 3


def test_where_nothing_is_drafted_a_new_batch_is_not_looked_at_sooner(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 3, a)
    drafter.it.idle = 4 * EVERY
    drafter.decode(3, a)  # which looks
    drafter.read(0, 3, b)
    for at in range(4, 3 + EVERY):
        assert drafter.decode(at, a, b, length=2) == 0
        assert not drafter.fed
    drafter.it.limit = 100
    drafter.decode(3 + EVERY, a, b, length=2)
    assert sorted(drafter.fed) == ["a", "b"]
    assert drafter.decode(4 + EVERY, a, b) == 2
    assert drafter.decode(5 + EVERY, b, length=2) == 0  # after drafts: at once
    assert sorted(drafter.fed) == ["b"]


def test_plain_steps_are_kept_before_a_prompt_is_read(drafter):
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, a)
    alone = [a]
    for at in (5, 6, 7):
        drafter.decode(at, same=alone)
    drafter.read(0, 5, b, chunked=b)
    assert drafter.count("a") == 8
    drafter.decode(8, same=alone)
    drafter.read(5, 2, b)
    assert [drafter.count(rid) for rid in "ab"] == [9, 7]


def test_a_step_after_a_prompt_is_not_timed(drafter):
    seconds = []
    drafter.it.observer.policy = Bag(
        observe_verify=lambda *_: None,
        observe_step=lambda batch, tokens, timed: seconds.append((batch, tokens, timed)),
        forget=lambda _: None,
    )
    a, b = Request("a"), Request("b")
    drafter.read(0, 5, a)
    drafter.decode(5, a)
    assert not seconds
    drafter.decode(6, a)
    drafter.read(0, 5, b)
    drafter.decode(7, a, b)
    assert seconds == [(1, 1, 1.0)]
    drafter.decode(8, b)
    assert seconds == [(1, 1, 1.0)] * 2


def test_a_step_without_drafts_is_prepared_as_without_nextn(drafter):
    """What a verification left is gone: slots that it reserved, penalties that it adds."""
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from qwen3next_plugin.engines.sglang.speculation.worker import Worker

    worker, freed = object.__new__(Worker), []
    worker._draft_worker, worker.speculative_algorithm = drafter.it, SpeculativeAlgorithm.EAGLE
    a, b = Request("a"), Request("b")
    a.kv = Bag(kv_committed_len=7, kv_allocated_len=15)
    b.kv = Bag(kv_committed_len=9, kv_allocated_len=9)
    batch = Bag(
        reqs=[a, b],
        sampling_info=Bag(acc_additive_penalties=1, acc_scaling_penalties=1),
        tree_cache=Bag(free_kv_row=lambda kv, ranges: freed.append((kv, ranges))),
    )
    drafter.it.lengths = {"b": 2}
    worker.choose_step(batch)
    assert batch.spec_algorithm.is_eagle()
    assert not freed
    drafter.it.lengths = {}
    worker.choose_step(batch)
    assert batch.spec_algorithm.is_none()
    assert freed == [(a.kv, [(7, 15)])]
    assert a.kv.kv_allocated_len == 7
    assert batch.sampling_info == Bag(acc_additive_penalties=None, acc_scaling_penalties=None)


# chains of different lengths --------------------------------------------------------------------


@pytest.fixture
def chains(monkeypatch):
    """What is drafted for requests of these lengths; the MTP layer counts up from a token."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.speculation import chains as module

    passes = []  # (positions, tokens) of each

    def run_layer(runner, *, positions, slots, requests, token_ids, hidden_states, **_):
        assert torch.equal(hidden_states, token_ids.float()[:, None])
        assert torch.equal(slots, 100 * requests + positions)
        passes.append((positions.tolist(), token_ids.tolist()))
        return hidden_states + 1

    monkeypatch.setattr(module, "run_layer", run_layer)
    draft_worker = object.__new__(module.Chains)
    draft_worker.draft_runner = Bag(model=Bag(get_top_tokens=lambda h: h[:, 0].long()))

    def draft(lengths, *, grammar=False):
        N = len(lengths)
        draft_worker.lengths = {f"r{i}": n for i, n in enumerate(lengths) if n}
        table = torch.arange(100 * (N + 1)).int().view(N + 1, 100)
        draft_worker.req_to_token_pool = Bag(req_to_token=table)
        bonus = 10 * torch.arange(1, N + 1)
        batch = Bag(
            reqs=[Bag(rid=f"r{i}", multimodal_inputs=None) for i in range(N)],
            seq_lens=torch.arange(N) + 7,
            req_pool_indices=torch.arange(N, 0, -1),
            spec_info=Bag(
                bonus_tokens=bonus,
                topk_index=bonus[:, None] + 1,
                hidden_states=bonus[:, None].float() + 1,
            ),
            has_grammar=grammar,
            sampling_info=Bag(has_custom_logit_processor=False),
        )
        passes.clear()
        return draft_worker.draft(batch), passes

    return draft


def test_each_request_verifies_its_own_drafts(chains):
    found, passes = chains([1, 0, 3])
    assert found.draft_token.tolist() == [10, 11, 20, 30, 31, 32, 33]
    assert found.positions.tolist() == [7, 8, 8, 9, 10, 11, 12]
    assert found.prepared_out_cache_loc.tolist() == [307, 308, 208, 109, 110, 111, 112]
    assert found.query_start_loc.tolist() == [0, 2, 3, 7]
    assert found.retrieve_index.tolist() == [[0, 1, -1, -1], [2, -1, -1, -1], [3, 4, 5, 6]]
    assert found.retrieve_next_token.tolist() == [[1, -1, -1, -1], [-1] * 4, [1, 2, 3, -1]]
    assert passes == [([9], [31]), ([10], [32])]


def test_nobody_needs_to_draft(chains):
    """As where the one that did is retracted."""
    found, passes = chains([0, 0])
    assert found.draft_token.tolist() == [10, 20]
    assert found.draft_token_num == 1
    assert not passes


def test_with_a_grammar_chains_are_filled_up(chains):
    found, _ = chains([2, 0], grammar=True)
    assert found.draft_token.tolist() == [10, 11, 12, 20, 0, 0]
    assert found.positions.tolist() == [7, 8, 9, 8, 9, 10]
    assert found.retrieve_index.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found.retrieve_next_token.tolist() == [[1, 2, -1], [-1, -1, -1]]


def test_the_scheduler_gets_rows_of_one_width(chains):
    found, _ = chains([1, 0, 2])
    T = len(found.draft_token)
    result = Bag(next_token_ids=torch.arange(T), logits_output=Bag(hidden_states=torch.ones(T, D)))
    found.widen(result, hidden_states=True)
    rows = result.next_token_ids.view(3, 3)
    assert [row[:n].tolist() for row, n in zip(rows, found.widths, strict=True)] == [
        [0, 1],
        [2],
        [3, 4, 5],
    ]
    assert result.logits_output.hidden_states.shape == (9, D)
