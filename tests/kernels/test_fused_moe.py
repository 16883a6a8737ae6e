"""The experts against their equation, for any routing and size; the same bits in any batch."""

import pytest
import torch

from qwen3next_plugin.kernels import fused_moe as op
from qwen3next_plugin.kernels.fused_moe import reference
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# T, D, E, I, k
SIZES = [(1, 8, 3, 6, 1), (5, 33, 7, 17, 3), (70, 96, 5, 40, 2), (260, 130, 4, 66, 4)]


def inputs(T, D, E, I, k, dtype):  # noqa: E741, the field's letter
    """Arguments of the op; x has gaps between its rows, some experts get no token."""
    x = torch.randn(T, D + 3).to(dtype)[:, :D]
    w13, w2 = torch.randn(E, 2 * I, D) * D**-0.5, torch.randn(E, D, I) * I**-0.5
    scores = torch.randn(T, E).softmax(-1)
    scores[:, 0] = 0 if k < E else scores[:, 0]
    weights, ids = scores.topk(k)
    return {
        "x": x,
        "w13": w13.to(dtype),
        "w2": w2.to(dtype),
        "topk_weights": weights / weights.sum(-1, keepdim=True),
        "topk_ids": ids.int(),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_against_the_reference(cpu_backend, sizes, dtype):
    arguments = inputs(*sizes, dtype)
    out = op.fused_moe(**arguments)
    ref = reference.run(*arguments.values())
    assert out.dtype == dtype
    assert_close("fused_moe", dtype, out, ref)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_tokens_share_the_batch(bits_level, dtype):
    """A token's result is the same bits alone, in any batch, and on one thread."""
    arguments = inputs(90, 72, 6, 34, 3, dtype)
    whole = op.fused_moe(**arguments)
    per_token = ("x", "topk_weights", "topk_ids")
    for begin, end in ((0, 1), (7, 9), (7, 12), (40, 90)):
        part = {name: t[begin:end] for name, t in arguments.items() if name in per_token}
        assert torch.equal(op.fused_moe(**arguments | part), whole[begin:end])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(op.fused_moe(**arguments), whole)
    finally:
        torch.set_num_threads(threads)


def test_no_tokens(cpu_backend):
    arguments = inputs(4, 8, 3, 6, 2, torch.float32)
    none = {name: arguments[name][:0] for name in ("x", "topk_weights", "topk_ids")}
    assert op.fused_moe(**arguments | none).shape == (0, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_route_to_no_expert_adds_nothing(cpu_backend, dtype):
    """The others' bits are those with weight 0; no expert runs for it, as expert 0 would overflow.

    Its weight may be anything.
    """
    arguments = inputs(70, 96, 5, 40, 2, dtype)  # none has expert 0
    none = torch.rand(70, 2) < 0.5
    none[7] = True
    ids, weights = arguments["topk_ids"], arguments["topk_weights"]
    expected = op.fused_moe(**arguments | {"topk_weights": weights.masked_fill(none, 0)})
    arguments["w13"][0] = arguments["w2"][0] = torch.finfo(dtype).max
    arguments["topk_ids"] = ids.masked_fill(none, -1)
    for weight in (0, 1, float("nan")):
        arguments["topk_weights"] = weights.masked_fill(none, weight)
        assert torch.equal(op.fused_moe(**arguments), expected)
    assert not expected[7].any()
    arguments["topk_ids"] = torch.full_like(ids, -1)
    assert not op.fused_moe(**arguments).any()


@pytest.mark.parametrize("expert", [-2, 3])
def test_refuses_what_is_no_expert(cpu_backend, expert):
    arguments = inputs(4, 8, 3, 6, 2, torch.float32)
    arguments["topk_ids"][2, 1] = expert
    with pytest.raises(RuntimeError, match=rf"topk_ids\[2, 1\] = {expert} is not one of 3 experts"):
        op.fused_moe(**arguments)


def test_refuses(cpu_backend):
    arguments = inputs(4, 8, 3, 6, 2, torch.float32)
    for name, bad, complaint in (
        ("x", arguments["x"].double(), r"x is torch\.float64"),
        ("x", arguments["x"][0], r"x has shape \(8,\), not 2 dims"),
        ("w13", arguments["w13"][0], r"w13 has shape \(.*, 8\), not 3 dims"),
        ("topk_ids", arguments["topk_ids"][0], r"topk_ids has shape \(2,\), not 2 dims"),
        ("w13", arguments["w13"][:, :11], "w13 has shape"),
        ("w13", arguments["w13"].bfloat16(), r"w13 is torch\.bfloat16"),
        ("w2", arguments["w2"][:2], "w2 has shape"),
        ("topk_ids", arguments["topk_ids"].long(), r"topk_ids is torch\.int64"),
        ("topk_weights", arguments["topk_weights"][:3], "topk_weights has shape"),
        ("w2", arguments["w2"].transpose(1, 2).contiguous().transpose(1, 2), "not contiguous"),
    ):
        with pytest.raises(ValueError, match=f"fused_moe: .*{complaint}"):
            op.fused_moe(**arguments | {name: bad})
