"""The sigmoid gate on the shared expert, with and without the routed experts' output."""

import pytest
import torch

from qwen3next_plugin.kernels.shared_expert_gate import shared_expert_gate
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(T, D, dtype, with_routed=True):
    """Arguments of the op, with gaps of different sizes between the rows."""
    return {
        "x": torch.randn(T, D + 5).to(dtype)[:, :D],
        "weight": (torch.randn(1, D) * D**-0.5).to(dtype),
        "shared_": torch.randn(T, D + 3).to(dtype)[:, :D],
        "routed": torch.randn(T, D + 1).to(dtype)[:, :D] if with_routed else None,
    }


def expected(x, weight, shared_, routed):
    gate = torch.sigmoid(x.double() @ weight.double().T)  # [T, 1]
    return gate * shared_.double() + (0 if routed is None else routed.double())


@pytest.mark.parametrize("with_routed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [0, 1, 65])
@pytest.mark.parametrize("D", [1, 7, 96, 2048])
def test_against_torch(backend, T, D, dtype, with_routed):
    given = inputs(T, D, dtype, with_routed)
    ref = expected(**given)
    before = {name: t.clone() for name, t in given.items() if t is not None}
    gaps = given["shared_"]._base[:, D:].clone()
    shared_expert_gate(**given)
    assert_close("shared_expert_gate", dtype, given["shared_"], ref)
    assert torch.equal(given["shared_"]._base[:, D:], gaps)
    for name in before.keys() - {"shared_"}:
        assert torch.equal(given[name], before[name])


def test_fp32_weight_beside_bf16(backend):
    given = inputs(3, 96, torch.bfloat16) | {"weight": torch.randn(1, 96)}
    ref = expected(**given)
    shared_expert_gate(**given)
    assert_close("shared_expert_gate", torch.bfloat16, given["shared_"], ref)


def test_rounded_once(backend):
    """The only rounding is at the end: the error is at most half a step of bf16."""
    given = inputs(9, 130, torch.bfloat16)
    ref = expected(**given)
    shared_expert_gate(**given)
    assert ((given["shared_"].double() - ref).abs() <= ref.abs() * 2**-8 + 1e-6).all()


def test_open_and_shut(backend):
    """Gates saturate at one and zero, and a NaN row does not affect another."""
    given = inputs(4, 33, torch.float32, with_routed=False) | {"weight": torch.ones(1, 33)}
    before = given["shared_"].clone()
    for row, value in enumerate((1e4, -1e4, torch.nan, torch.inf)):
        given["x"][row] = value
    shared_expert_gate(**given)
    torch.testing.assert_close(given["shared_"][[0, 3]], before[[0, 3]])
    torch.testing.assert_close(given["shared_"][1], torch.zeros(33), rtol=0, atol=1e-30)
    assert given["shared_"][2].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_tokens_share_the_batch(backend, dtype):
    given = inputs(40, 203, dtype)
    shared = given["shared_"].clone()
    shared_expert_gate(**given)
    for begin, end in ((0, 1), (7, 9), (5, 40)):
        part = {name: t[begin:end] for name, t in given.items()}
        part |= {"weight": given["weight"], "shared_": shared[begin:end].clone()}
        shared_expert_gate(**part)
        assert torch.equal(part["shared_"], given["shared_"][begin:end])


def test_refuses(backend):
    given = inputs(3, 8, torch.float32)
    before = given["shared_"].clone()
    for name, bad, complaint in (
        ("x", given["x"].double(), r"x is torch\.float64"),
        ("weight", given["weight"][0], "weight has shape"),
        ("weight", given["weight"].half(), r"weight is torch\.float16"),
        ("shared_", given["shared_"][:2], "shared_ has shape"),
        ("shared_", given["shared_"].bfloat16(), r"shared_ is torch\.bfloat16"),
        ("routed", given["routed"][:, :7], "routed has shape"),
        ("routed", given["routed"].half(), r"routed is torch\.float16"),
        ("x", torch.zeros(8, 3).t(), "the last dim of x is not contiguous"),
        ("x", torch.zeros(8), r"x has shape \(8,\), not 2 dims"),
    ):
        with pytest.raises(ValueError, match=f"shared_expert_gate: .*{complaint}"):
            shared_expert_gate(**given | {name: bad})
    assert torch.equal(given["shared_"], before)
