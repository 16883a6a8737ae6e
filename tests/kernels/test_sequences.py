"""Any sequence of steps on a page equals the plain recurrence over the tokens that survived."""

from dataclasses import dataclass

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from state_pages import SMALL, Layer, Pool, Step, concatenated

from tolerances import assert_close

W, SLOTS = 3, 3
LONG = (W + 1, 17, 66)


@dataclass(frozen=True)
class Act:
    """Keep `kept` of the tokens that may be rolled back, maybe move the page, run n tokens."""

    kept: int
    move: bool
    tokens: int


acts = st.builds(
    Act,
    kept=st.integers(0, W),
    move=st.booleans(),
    tokens=st.one_of(st.integers(0, W), st.integers(1, W), st.sampled_from(LONG)),
)


@given(st.lists(acts, min_size=1, max_size=9), st.integers(0, 2**31))
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_sequence_of_steps(backend, sequence, seed):
    torch.manual_seed(seed)
    layer, pool, slot = Layer.random(SMALL), Pool(SMALL, SLOTS, W), 0
    survivors = layer.projections(0)
    p0 = w = 0
    outs, refs = [], []
    for act in sequence:
        c = p0 + min(act.kept, w)
        if act.move:  # a verbatim copy; what is left behind must not matter
            target = (slot + 1) % SLOTS
            pool.raw[target] = pool.raw[slot]
            pool.raw[slot] = 0xFF
            slot = target
        x = layer.projections(act.tokens)
        out = layer.run(pool, Step(((slot, c, act.tokens),)), x)
        survivors = concatenated({name: value[:c] for name, value in survivors.items()}, x)
        p0, w = (c, act.tokens) if act.tokens <= W else (c + act.tokens, 0)
        assert pool.span_[slot].tolist() == [p0, w]
        outs.append(out)
        refs.append(expected(layer, survivors)[c:])
    assert_close("gated_delta_rule", torch.float32, torch.cat(outs), torch.cat(refs))
    pool.assert_untouched_but(list(range(SLOTS)))


def expected(layer: Layer, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """Output of the plain layer over a whole sequence."""
    s = layer.shape
    q, k, v = layer.convolved(x).split([s.H * s.K, s.H * s.K, s.H * s.R], dim=-1)
    q, k, v = q.unflatten(1, (s.H, s.K)), k.unflatten(1, (s.H, s.K)), v.unflatten(1, (s.HV, s.V))
    return layer.recurrence({**x, "q": q, "k": k, "v": v})[0]
