"""What the drafter makes of SGLang's batches; when it drafts is in tests/mtp/test_loop.py."""

import sys
from types import SimpleNamespace as Bag
from typing import Any

import pytest
import torch

D = 2


class Request(Bag):
    """What the drafter reads of one."""

    def __init__(self, rid: str, prompt: int = 5) -> None:
        super().__init__(
            rid=rid,
            ended=False,
            origin_input_ids=[0] * prompt,
            output_ids=[],
            retraction_count=0,
            sampling_params=Bag(max_new_tokens=99),
        )

    def finished(self) -> bool:
        return self.ended


class Steps:
    """A drafter of up to three tokens, and the steps that SGLang reports to it."""

    def __init__(self, drafter: Any, fed: dict[str, tuple[int, int]]) -> None:
        self.drafter, self.fed = drafter, fed  # request → first position, tokens, as read last
        self.loop, self.timed = drafter.loop, list[float]()
        self.loop.observer.policy = Bag(
            lengths=lambda requests, pending: [3] * len(requests),
            observe_verify=lambda *_: None,
            observe_step=lambda batch, tokens, seconds: self.timed.append(seconds),
            observe_draft=lambda *_: None,
            forget=lambda _: None,
            snapshot=lambda: {},
        )

    def read(self, first: int, count: int, *requests: Request, chunked: Request | None = None):
        N = len(requests)
        batch = Bag(
            reqs=list(requests),
            input_ids=torch.arange(N * count),
            prefix_lens=[first] * N,
            extend_lens=[count] * N,
            chunked_req=chunked,
            chunked_req_next_prompt_token=None if chunked is None else 7,
        )
        return self.drafter.after_prompts(batch, torch.zeros(N * count, D), torch.zeros(N).long())

    def decode(self, at: int, reqs: list[Request], seconds: float = 1.0) -> dict[str, int]:
        """Verifies what was drafted, and accepts nothing; the lengths of the first drafts."""
        drafter, N = self.drafter, len(reqs)
        batch = Bag(reqs=reqs, seq_lens=torch.full((N,), at))
        widths = [1 + drafter.lengths.get(request.rid, 0) for request in reqs]
        T = sum(widths)
        result = Bag(
            next_token_ids=torch.zeros(T).int(),
            accept_lens=torch.ones(N).int(),
            logits_output=Bag(hidden_states=torch.zeros(T, D)),
            next_draft_input=Bag(bonus_tokens=torch.zeros(N).long()),
        )
        timing = {"step_seconds": seconds, "draft_seconds": 0.0}
        if T > N:
            assert drafter.has_drafts(batch)
            drafter.after_verification(batch, result, widths, **timing)
        else:
            batch.seq_lens += 1  # as SGLang prepares a plain step
            drafter.after_plain_step(batch, result, **timing)
        return drafter.lengths

    def pending(self, *names: str) -> list[int]:
        return [self.loop.pending.count(name) for name in names]


@pytest.fixture
def steps(monkeypatch):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.speculation import drafter as module

    schedule = Bag(chunked_prefill_size=8, max_prefill_tokens=100)
    monkeypatch.setattr(module, "get_schedule", lambda: schedule)
    monkeypatch.setattr(module, "get_parallel", lambda: Bag(tp_group=Bag(world_size=1)))
    monkeypatch.setattr(module, "get_disagg", lambda: Bag(disaggregation_mode="null"))
    fed = {}

    def forward(self, batch, rows):
        fed.clear()
        fed.update({row.request: (row.fed.first, len(row.fed)) for row in rows})
        return (torch.zeros(sum(row.draft > 0 for row in rows), D),) * 2

    monkeypatch.setattr(module.Drafter, "_forward", forward)
    model = Bag(get_top_tokens=lambda h: torch.full((len(h),), 5), make_draft_head=lambda: None)
    return Steps(module.Drafter(Bag(model=model, model_config=Bag(), device="cpu"), None, 3), fed)


def test_a_prompt_is_read_with_the_step_after_it(steps):
    a = Request("a")
    drafts = steps.read(0, 5, a)
    assert drafts.hidden_states.shape == (1, D)
    assert steps.pending("a") == [5]
    assert steps.decode(5, [a]) == {"a": 3}
    assert steps.fed == {"a": (0, 6)}
    assert steps.decode(6, [a]) == {"a": 3}
    assert steps.fed == {"a": (6, 1)}


def test_a_server_of_prompts_only_reads_them_at_once(steps):
    """In chunks, with the token that follows each; what another server drafts from is all there."""
    a, b = Request("a", 10), Request("b")
    steps.loop.must_run = True
    steps.read(0, 5, a, chunked=a)
    assert steps.fed == {"a": (0, 5)}
    drafts = steps.read(5, 4, a, b)
    assert steps.fed == {"a": (5, 4), "b": (5, 4)}
    assert steps.pending("a", "b") == [0, 0]
    assert (drafts.topk_p.shape, drafts.topk_index.shape) == ((2, 1), (2, 1))
    assert drafts.hidden_states.shape == (2, D)
    assert all(not len(row.tokens.hidden_states) for row in steps.loop.rows)


def test_a_prefill_server_reads_prompts_of_any_length(steps, monkeypatch):
    """In one pass, as its trunk does with `--chunked-prefill-size -1`."""
    from qwen3next_plugin.engines.sglang.speculation import drafter as module

    monkeypatch.setattr(module, "get_disagg", lambda: Bag(disaggregation_mode="prefill"))
    runner = Bag(model=Bag(make_draft_head=lambda: None), model_config=Bag(), device="cpu")
    loop = module.Drafter(runner, None, 3).loop
    assert (loop.must_run, loop.max_tokens) == (True, sys.maxsize)


def test_a_resumed_request_drafts_no_more(steps):
    """A decode server puts no KV of the MTP layer aside, and reads no prompt."""
    a, b = Request("a"), Request("b")
    steps.drafter.resumes, steps.loop.max_tokens = True, 100
    assert steps.decode(5, [a, b]) == {"a": 3, "b": 3}
    a.retraction_count = 1
    assert steps.decode(6, [b]) == {"b": 3}
    for at in (7, 8):
        assert steps.decode(at, [a, b]) == {"b": 3}
        assert steps.fed == {"b": (at, 1)}


def test_steps_of_the_same_batch_are_collected(steps):
    """SGLang keeps the list of requests while the batch is the same."""
    a, b = Request("a"), Request("b")
    steps.read(0, 5, a, b)
    steps.loop.idle, steps.loop.wait, steps.loop.max_tokens = 100, 4, 100
    same = [a, b]
    for at in (5, 6, 7):
        steps.decode(at, same)
        assert steps.pending("a", "b") == [5, 5]
    assert steps.decode(8, same) == {"a": 3, "b": 3}
    assert steps.fed == dict.fromkeys("ab", (0, 9))


def test_what_ended_is_dropped(steps):
    a, b = Request("a"), Request("b")
    steps.read(0, 5, a, b)
    steps.loop.wait = 10
    steps.decode(5, [a, b])
    steps.decode(6, [b])
    assert steps.pending("a", "b") == [0, 6]


def test_an_unfinished_prompt_outlives_other_steps(steps):
    a, b = Request("a"), Request("b")
    steps.loop.wait = 10
    steps.read(0, 5, b)
    steps.read(0, 5, a, chunked=a)
    for at in (5, 6):
        steps.decode(at, [b])
    assert steps.pending("a") == [5]
    steps.read(5, 5, a)
    assert steps.pending("a") == [10]
    steps.decode(7, [b])  # it is aborted
    assert steps.pending("a") == [0]


def test_prompts_that_end_at_once_leave_nothing(steps):
    """As where only their log-probabilities are asked for, so that no step decodes."""
    for rid in "abc":
        request = Request(rid)
        steps.read(0, 5, request)
        request.ended = True
    assert steps.pending(*"abc") == [0, 0, 5]


def test_a_retracted_request_is_read_anew(steps):
    a, b = Request("a"), Request("b")
    steps.loop.max_tokens = 100
    steps.read(0, 5, a, b)
    assert steps.decode(5, [a, b]) == {"a": 3, "b": 3}
    steps.read(2, 4, a)  # its first two tokens were still cached
    assert steps.pending("a") == [4]
    assert steps.drafter.lengths == {"b": 3}


def test_nothing_is_drafted_beyond_the_end_of_an_answer(steps):
    ends, goes_on = Request("ends"), Request("goes on")
    ends.sampling_params.max_new_tokens = 5
    steps.loop.max_tokens = 100
    steps.read(0, 5, ends, goes_on)
    for at, drafts in ((5, 2), (6, 1), (7, None), (8, None)):
        lengths = steps.decode(at, [ends, goes_on])
        assert (lengths.get("ends"), lengths["goes on"]) == (drafts, 3)


def test_a_step_after_a_prompt_is_not_timed(steps):
    """The scheduler still does work for the prompt."""
    a, b = Request("a"), Request("b")
    steps.read(0, 5, a)
    steps.decode(5, [a])
    assert steps.timed == []
    steps.decode(6, [a], seconds=2.0)
    steps.read(0, 5, b)
    steps.decode(7, [a, b])
    assert steps.timed == [2.0]
    steps.decode(8, [b], seconds=3.0)
    assert steps.timed == [2.0, 3.0]


def test_batches_and_results_are_rows(steps):
    from qwen3next_plugin.engines.sglang.speculation import batches

    a, b, c = (Request(rid) for rid in "abc")
    batch = Bag(
        reqs=[a, b],
        input_ids=torch.tensor([10, 11, 12, 20, 21]),
        prefix_lens=[4, 0],
        extend_lens=[3, 2],
        chunked_req=b,
        chunked_req_next_prompt_token=22,
    )
    step = batches.read(batch, torch.zeros(5, D), torch.tensor([13, 99]))
    assert step.token_ids.tolist() == [11, 12, 13, 21, 22]
    assert [(row.tokens.first, len(row.tokens)) for row in map(step.row, (0, 1))] == [
        (4, 3),
        (0, 2),
    ]
    assert (step.prefilling, step.continues) == ([False, True], [False, False])

    batch = Bag(reqs=[a, b, c], seq_lens=torch.tensor([7, 2, 30]))
    result = Bag(  # with a filler token of b
        next_token_ids=torch.tensor([1, 2, 3, 4, 5, 6]),
        accept_lens=torch.tensor([2, 1, 1]),
        logits_output=Bag(hidden_states=torch.arange(6.0)[:, None].expand(-1, D)),
    )
    step = batches.verified(batch, result, [3, 2, 1], {"a": 2, "gone": 1})
    rows = [step.row(i) for i in range(3)]
    assert [(row.tokens.first, row.tokens.token_ids.tolist()) for row in rows] == [
        (7, [1, 2]),
        (2, [4]),
        (30, [6]),
    ]
    assert rows[1].tokens.hidden_states[:, 0].tolist() == [3.0]
    assert [(row.drafted, row.accepted) for row in rows] == [(2, 1), (0, 0), (0, 0)]
    assert not step.is_plain
    result.next_token_ids, result.logits_output.hidden_states = (
        torch.tensor([1, 2, 3]),
        torch.zeros(3, D),
    )
    step = batches.decoded(batch, result)
    assert (step.firsts, step.is_plain, step.verifies) == ([6, 1, 29], True, False)


@pytest.mark.parametrize("room", [True, False], ids=["room", "no room"])
def test_a_step_without_drafts_is_prepared_as_without_nextn(steps, room):
    """What a verification left is gone: locations that it reserved, penalties that it adds.

    Drafts are dropped where one has no room.
    """
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    from qwen3next_plugin.engines.sglang.speculation.worker import Worker

    worker, freed = object.__new__(Worker), []
    worker.drafter, worker.speculative_algorithm = steps.drafter, SpeculativeAlgorithm.EAGLE
    a, b = Request("a"), Request("b")
    a.kv = Bag(kv_committed_len=7, kv_allocated_len=15)
    b.kv = Bag(kv_committed_len=9, kv_allocated_len=9)
    batch = Bag(
        reqs=[a, b],
        sampling_info=Bag(acc_additive_penalties=1, acc_scaling_penalties=1),
        tree_cache=Bag(free_kv_row=lambda kv, ranges: freed.append((kv, ranges))),
        check_decode_mem=lambda: room,
    )
    steps.drafter.lengths = {"b": 2, "of no batch": 3}
    worker.choose_step(batch)
    assert steps.drafter.lengths.keys() - {"of no batch"} == ({"b"} if room else set())
    if room:
        assert batch.spec_algorithm.is_eagle()
        assert not freed
        steps.drafter.lengths = {}
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

    def run_layer(runner, *, positions, locations, requests, token_ids, hidden_states, **_):
        assert torch.equal(hidden_states, token_ids.float()[:, None])
        assert torch.equal(locations, 100 * requests + positions)
        passes.append((positions.tolist(), token_ids.tolist()))
        return hidden_states + 1, hidden_states + 1

    monkeypatch.setattr(module, "run_layer", run_layer)
    drafter = module.Chains(Bag(model=Bag(get_top_tokens=lambda h: h[:, 0].long())), None)

    def draft(lengths, *, grammar=False):
        N = len(lengths)
        drafter.lengths = {f"r{i}": n for i, n in enumerate(lengths) if n}
        table = torch.arange(100 * (N + 1)).int().view(N + 1, 100)
        drafter.req_to_token_pool = Bag(req_to_token=table)
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
        return drafter.draft(batch), passes

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
