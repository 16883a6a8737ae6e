"""Any sequence of steps on pages equals the plain recurrence over the tokens that were kept."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_pages import Layer, Pool, Shape, Step, concatenated, rows_of

from qwen3next_plugin.kernels import native
from tolerances import assert_close

SHAPES = (Shape(1, 2, 16, 24), Shape(2, 4, 24, 16), Shape(1, 1, 17, 5))
REQUESTS = 2
LONG = (5, 8, 17, 33)


@dataclass(frozen=True)
class Act:
    """What happens to one request in one step."""

    kept: int  # of the tokens that may be rolled back
    tokens: int | None  # None: it is not in the step
    page: str = "stays"  # or "moves", or "resumes" from an older copy, or the request "restarts"


def acts(num_drafts: int) -> st.SearchStrategy[Act]:
    short = st.integers(0, num_drafts + 1)
    tokens = st.one_of(short, short, st.sampled_from(LONG), st.none())
    page = st.sampled_from(("stays",) * 5 + ("moves", "resumes", "restarts"))
    return st.builds(Act, st.integers(0, num_drafts + 1), tokens, page)


plans = st.sampled_from((0, 1, 3)).flatmap(
    lambda num_drafts: st.tuples(
        st.just(num_drafts),
        st.lists(st.tuples(*[acts(num_drafts)] * REQUESTS, st.booleans()), min_size=1, max_size=8),
    )
)


class Request:
    """A request on its page, together with the plain recurrence, token by token."""

    def __init__(self, layer: Layer, slot: int):
        self.layer, self.slot = layer, slot
        self.copies = []  # of the page, each with what it holds
        self.restart()

    def restart(self) -> None:
        s = self.layer.shape
        self.start = self.end = 0
        self.tokens = self.layer.projections(0)
        self.states = [torch.zeros(s.HV, s.K, s.V, dtype=torch.float64)]  # after each token

    def prepare(self, act: Act, pool: Pool, free: int) -> int:
        """Apply the act to the page; returns the context length to continue at."""
        if act.page == "restarts":
            self.restart()
        elif act.page == "moves":  # what is left behind must not matter
            pool.raw[free] = pool.raw[self.slot]
            pool.raw[self.slot] = 0xFF
            self.slot = free
        elif act.page == "resumes" and self.copies:
            page, self.start, self.end, tokens, states = self.copies[act.kept % len(self.copies)]
            pool.raw[self.slot], self.tokens, self.states = page, tokens, list(states)
        c = min(self.start + act.kept, self.end)
        self.tokens, self.states = rows_of(self.tokens, 0, c), self.states[: c + 1]
        return c

    def expect(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Output of the plain layer for the next tokens, fp64."""
        s, c = self.layer.shape, len(self.states) - 1
        self.tokens = concatenated(self.tokens, x)
        past = rows_of(self.tokens, max(0, c - 3), len(self.tokens["q"]))
        qkv = self.layer.convolved(past)[min(c, 3) :]
        q, k, v = qkv.split([s.H * s.K, s.H * s.K, s.H * s.R], dim=-1)
        heads = {"q": q.unflatten(1, (s.H, s.K)), "k": k.unflatten(1, (s.H, s.K))}
        outs = self.layer.recurrence(
            {**x, **heads, "v": v.unflatten(1, (s.HV, s.V))}, self.states[-1], self.states
        )
        return outs[0]

    def advance(self, pool: Pool, c: int, n: int) -> None:
        self.start, self.end = (c if n <= pool.num_drafts + 1 else c + n), c + n
        assert pool.span_[self.slot].tolist() == [self.start, self.end]
        page = pool.raw[self.slot].clone()
        self.copies.append((page, self.start, self.end, self.tokens, list(self.states)))


def check(plan, seed: int) -> None:
    torch.manual_seed(seed)
    num_drafts, steps = plan
    layer = Layer.random(SHAPES[seed % len(SHAPES)])
    pool = Pool(layer.shape, REQUESTS + 1, num_drafts)
    requests = [Request(layer, slot) for slot in range(REQUESTS)]
    outs, refs = [], []
    for *acts_, padded in steps:
        rows, parts = [(-1, 3, 1)] * padded, [layer.projections(1)] * padded
        members = []
        for request, act in zip(requests, acts_, strict=True):
            if act.tokens is None:
                continue
            free = (set(range(REQUESTS + 1)) - {r.slot for r in requests}).pop()
            c = request.prepare(act, pool, free)
            x = layer.projections(act.tokens)
            rows.append((request.slot, c, act.tokens))
            parts.append(x)
            members.append((request, c, act.tokens))
            refs.append(request.expect(x))
        if not members:
            continue
        out = layer.run(pool, Step(tuple(rows)), concatenated(*parts))
        assert (out[:padded] == 0).all()
        outs.append(out[padded:])
        for request, c, n in members:
            request.advance(pool, c, n)
    if outs:
        assert_close("gated_delta_rule", torch.float32, torch.cat(outs), torch.cat(refs))
    for request in requests:
        if request.end:
            assert_close(
                "gated_delta_rule",
                torch.float32,
                pool.state_at_end(request.slot),
                request.states[-1],
            )
    pool.assert_untouched_but(list(range(REQUESTS + 1)))


def test_any_sequence_of_steps(backend, size):
    """Most sequences run on the highest instruction set, the fewest in Triton's interpreter."""
    best = [level for level in native.levels() if level != "amx"][-1]  # which has no such op
    examples = {best: size(120, 900), "triton": size(2, 12)}

    @settings(
        max_examples=examples.get(backend, size(15, 75)),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(plans, st.integers(0, 2**31))
    def any_sequence(plan, seed):
        check(plan, seed)

    any_sequence()


@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_any_sequence_of_steps_with_rows_that_are_split(backend, split_rows, size):
    test_any_sequence_of_steps(backend, size)
