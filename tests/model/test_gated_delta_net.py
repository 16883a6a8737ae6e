"""The linear-attention layer on its pages is transformers' Qwen3NextGatedDeltaNet."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BASE, SHAPES
from model.layers import LinearLayer

CONFIGS = {"base": {}, **SHAPES}
TOLERANCE = 1e-4  # relative; two fp32 implementations that sum in other orders


def module(changes: dict, seed: int = 0) -> torch.nn.Module:
    """transformers' layer with random weights that make its state matter."""
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    config = modeling.Qwen3NextConfig(**(BASE | changes))
    layer = modeling.Qwen3NextGatedDeltaNet(config, layer_idx=0).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name not in ("A_log", "dt_bias"):
                parameter.normal_(generator=generator)
                parameter /= parameter.shape[-1] ** 0.5
        layer.dt_bias.uniform_(-6, -2, generator=generator)
        layer.A_log.uniform_(0, 2, generator=generator)
    return layer


@cache
def shared_module() -> torch.nn.Module:
    return module(SHAPES["HV=4H_dense-layers_top-3-of-12"])


def tokens(layer: torch.nn.Module, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, layer.hidden_size, generator=generator)


def expected(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return layer(x[None])[0]


def near(found: torch.Tensor, reference: torch.Tensor) -> None:
    assert torch.isfinite(found).all()
    assert (found - reference).norm() <= TOLERANCE * reference.norm()


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 63, 64, 65, 200])
def test_prefill_then_decode(changes, prompt):
    layer = module(changes)
    ours, x = LinearLayer(layer), tokens(layer, prompt + 9)
    outputs = [ours.step({2: x[:prompt]})[2]]
    outputs += [ours.step({2: x[t : t + 1]})[2] for t in range(prompt, len(x))]
    near(torch.cat(outputs), expected(layer, x))


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_ragged_rows_do_not_meet(changes):
    """Prefill, decode and drafts of several lengths in one step, on pages of their own."""
    layer = module(changes)
    ours = LinearLayer(layer)
    xs = {slot: tokens(layer, 120, seed=slot) for slot in range(4)}
    outputs = {slot: [] for slot in xs}
    at = dict.fromkeys(xs, 0)
    for counts in ({0: 70, 1: 1}, {0: 1, 1: 3, 2: 33}, {3: 5, 0: 2, 2: 1, 1: 1}, {2: 3, 1: 64}):
        rows = {slot: xs[slot][at[slot] : at[slot] + n] for slot, n in counts.items()}
        for slot, out in ours.step(rows).items():
            outputs[slot].append(out)
            at[slot] += counts[slot]
    for slot, x in xs.items():
        near(torch.cat(outputs[slot]), expected(layer, x[: at[slot]]))


@settings(max_examples=25, deadline=None)
@given(
    prompt=st.integers(1, 70),
    rounds=st.lists(st.integers(1, 3).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))),
)
def test_rejected_drafts_leave_no_trace(prompt, rounds):
    """A rejected draft does not affect the outputs that follow."""
    layer = shared_module()
    ours, x = LinearLayer(layer), tokens(layer, prompt + 3 * len(rounds) + 1)
    kept, at = [ours.step({1: x[:prompt]})[1]], prompt
    for drafted, accepted in rounds:
        row = torch.cat([x[at : at + accepted], tokens(layer, drafted - accepted, seed=at)])
        kept.append(ours.step({1: row}, accepted={1: accepted})[1][:accepted])
        at += accepted
    kept.append(ours.step({1: x[at : at + 1]})[1])
    near(torch.cat(kept), expected(layer, x[: at + 1]))


def test_a_page_moved_goes_on_as_before():
    layer = module({})
    ours, x = LinearLayer(layer), tokens(layer, 80)
    first = ours.step({0: x[:70]})[0]
    second = ours.step({0: x[70:73]}, accepted={0: 2})[0][:2]
    ours.raw[3] = ours.raw[0]
    ours.raw[0] = -1
    ours.lengths[3] = ours.lengths[0]
    third = ours.step({3: x[72:73]})[3]
    near(torch.cat([first, second, third]), expected(layer, x[:73]))


def test_a_page_that_does_not_stand_there_is_refused():
    layer = module({})
    ours, x = LinearLayer(layer), tokens(layer, 10)
    ours.step({1: x[:5]})
    ours.lengths[1] = 9
    with pytest.raises(RuntimeError, match=r"row 0: slot 1 .* context length"):
        ours.step({1: x[:1]})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_activations_stay_near(dtype):
    layer = module({})
    x = tokens(layer, 90)
    reference = expected(layer, x)
    ours = LinearLayer(layer.to(dtype))
    x = x.to(dtype)
    outputs = [ours.step({0: x[:70]})[0]]
    outputs += [ours.step({0: x[t : t + 1]})[0] for t in range(70, 90)]
    error = (torch.cat(outputs).float() - reference).norm() / reference.norm()
    theirs = (expected(layer, x).float() - reference).norm() / reference.norm()
    assert error <= 1.1 * theirs
