"""The router against its equation: any sizes, ties, rows without a softmax, any batch."""

import pytest
import torch

from qwen3next_plugin.kernels.router import router
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INF = float("inf")
# T, E, k
SIZES = [(0, 7, 2), (1, 1, 1), (3, 5, 5), (65, 17, 3), (9, 100, 33), (4, 512, 10)]


def logits_of(T, E, dtype):
    """Logits with gaps between the rows; the gaps hold values that would win if they were read."""
    apart = torch.full((T, E + 3), 1e4, dtype=dtype)
    apart[:, :E] = torch.randn(T, E) * 3
    return apart[:, :E]


def expected(logits, k, renormalise):
    """Weights in fp64, and the experts."""
    experts = logits.double().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = logits.double().softmax(-1).gather(1, experts)
    return weights / (weights.sum(-1, keepdim=True) if renormalise else 1), experts.int()


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "E", "k"), SIZES)
def test_against_torch(backend, T, E, k, dtype, renormalise):
    """16-bit logits have many ties."""
    logits = logits_of(T, E, dtype)
    weights, experts = router(logits=logits, top_k=k, renormalise=renormalise)
    ref_weights, ref_experts = expected(logits, k, renormalise)
    assert (weights.dtype, experts.dtype) == (torch.float32, torch.int32)
    assert weights.is_contiguous()
    assert experts.is_contiguous()
    assert torch.equal(experts, ref_experts)
    assert_close("router", torch.float32, weights, ref_weights)


@pytest.mark.parametrize("E", [19, 64])
def test_lower_expert_of_equals(backend, E):
    logits = torch.zeros(3, E)
    logits[1, [4, 9, E - 1]] = 1.0
    logits[2, 3::2] = -0.0
    _, experts = router(logits=logits, top_k=5, renormalise=True)
    assert experts.tolist() == [[0, 1, 2, 3, 4], [4, 9, E - 1, 0, 1], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("ascending", [False, True])
def test_sorted_rows(backend, ascending):
    """Ascending logits, each of which displaces an earlier one, and descending ones."""
    logits = torch.arange(77.0)[None] * (1 if ascending else -1)
    weights, experts = router(logits=logits, top_k=4, renormalise=False)
    assert experts.tolist() == [[76, 75, 74, 73] if ascending else [0, 1, 2, 3]]
    assert_close("router", torch.float32, weights, expected(logits, 4, False)[0])


@pytest.mark.parametrize("renormalise", [False, True])
def test_large_and_far_logits(backend, renormalise):
    """No sum overflows; logits far below the greatest get weight zero."""
    logits = torch.tensor([[3e38, -3e38, 3e38, 0.0], [-3e38, -3e38, -INF, -INF]])
    weights, experts = router(logits=logits, top_k=3, renormalise=renormalise)
    assert experts.tolist() == [[0, 2, 3], [0, 1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5, 0.0]] * 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 3, 36])
def test_rows_without_a_softmax(backend, at, dtype):
    """Their weights are NaN and their experts valid; other rows are not affected."""
    logits = torch.randn(7, 37).to(dtype)
    alone = router(logits=logits, top_k=3, renormalise=True)
    bad = logits.clone()
    bad[1, at], bad[3, at], bad[5] = torch.nan, INF, -INF
    weights, experts = router(logits=bad, top_k=3, renormalise=True)
    assert weights[1::2].isnan().all()
    assert experts[1::2].tolist() == [[0, 1, 2]] * 3
    assert torch.equal(weights[::2], alone[0][::2])
    assert torch.equal(experts[::2], alone[1][::2])


@pytest.mark.parametrize("renormalise", [False, True])
def test_whatever_tokens_share_the_batch(backend, renormalise):
    logits = logits_of(300, 70, torch.bfloat16)[: 20 if backend == "triton" else 300]
    weights, experts = router(logits=logits, top_k=6, renormalise=renormalise)
    for begin, end in ((0, 1), (7, 9), (3, 20)):
        part = router(logits=logits[begin:end], top_k=6, renormalise=renormalise)
        assert torch.equal(part[0], weights[begin:end])
        assert torch.equal(part[1], experts[begin:end])


def test_refuses(backend):
    logits = torch.zeros(3, 8)
    for k in (0, -1, 9):
        with pytest.raises(ValueError, match=f"router: top_k = {k} of 8 experts"):
            router(logits=logits, top_k=k, renormalise=True)
    with pytest.raises(ValueError, match=r"router: logits is torch\.float64"):
        router(logits=logits.double(), top_k=2, renormalise=True)
    with pytest.raises(ValueError, match="router: the last dim of logits is not contiguous"):
        router(logits=logits.t().contiguous().t(), top_k=2, renormalise=True)
    with pytest.raises(ValueError, match=r"router: logits has shape \(8,\), not 2 dims"):
        router(logits=logits[0], top_k=2, renormalise=True)


def test_the_torch_op_names_a_dtype_that_it_does_not_take(native_level):
    """A graph calls it without the public op's checks."""
    with pytest.raises(RuntimeError, match=r"values are torch\.float64: use float32, bfloat16 or"):
        torch.ops.qwen3next.router(torch.zeros(3, 8).double(), 2, True)
