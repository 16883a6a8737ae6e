"""The int8 head: exact in integers, close to the full head, independent of the batch."""

import itertools

import pytest
import torch

from qwen3next_plugin.kernels import draft_head as op
from qwen3next_plugin.kernels.draft_head import quantise_channels, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draft_head(x, weight, scale, token_ids=None):
    """The op; over the whole head unless token_ids are given."""
    if token_ids is None:
        token_ids = torch.arange(len(weight), dtype=torch.int32)
    return op.draft_head(x=x, weight=weight, scale=scale, token_ids=token_ids)


def head(R, D, dtype=torch.float32):
    """A head whose rows differ in size, as int8, with gaps between the rows."""
    weight = (torch.randn(R, D) * torch.rand(R, 1)).to(dtype)
    quantised, scale = quantise_channels(weight)
    apart = torch.full((R, D + 3), 99, dtype=torch.int8)
    apart[:, :D] = quantised
    return weight, apart[:, :D], scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [0, 1, 3, 17])
@pytest.mark.parametrize(("R", "D"), [(1, 1), (3, 7), (257, 96), (1021, 203), (131, 2048)])
def test_exactly_the_reference(cpu_backend, N, R, D, dtype):
    _, weight, scale = head(R, D)
    x = (torch.randn(N, D + 5) * 3).to(dtype)[:, :D]
    for some in (torch.arange(R), torch.randperm(R)[: 1 + R // 3]):
        rows, values = draft_head(x, weight, scale, some.int())
        ref_rows, ref_values = reference.run(x, weight, scale, some.int())
        assert rows.dtype == torch.int64
        assert torch.isin(rows, some).all()
        assert torch.equal(rows, ref_rows)
        assert torch.equal(values, ref_values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_head(cpu_backend, dtype):
    """Its value is near the full head's for that row, and no other row is far above it."""
    N, R, D = 33, 1021, 200
    full, weight, scale = head(R, D, dtype)
    x = torch.randn(N, D).to(dtype)
    rows, values = draft_head(x=x, weight=weight, scale=scale)
    logits = x.double() @ full.double().T
    chosen = logits.gather(1, rows[:, None]).squeeze(1)
    # Each product is off by at most half a step, up or down at random.
    noise = x.double().norm(dim=1) * scale.double().max() / 12**0.5
    assert ((values - chosen).abs() < 5 * noise).all()
    assert ((logits.amax(1) - chosen) < 5 * noise).all()
    assert (rows == logits.argmax(1)).float().mean() > 0.9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_within_half_a_step(dtype):
    weight = torch.randn(77, 300).to(dtype)
    weight[5] = 0
    weight[6, 1:] = 0
    kept = weight.clone()
    quantised, scale = quantise_channels(weight)
    assert torch.equal(weight, kept)
    error = (weight.double() - quantised.double() * scale.double()[:, None]).abs()
    assert (error <= scale[:, None].double() * 0.5001).all()
    assert quantised.abs().amax() == 127
    assert torch.equal(quantised[5], torch.zeros(300, dtype=torch.int8))
    assert torch.equal(quantised[6, :1], weight[6, :1].sign().to(torch.int8) * 127)
    assert quantise_channels(weight[:0])[0].shape == (0, 300)


def test_quantises_in_chunks(monkeypatch):
    weight = torch.randn(77, 30).bfloat16()
    whole = quantise_channels(weight)
    monkeypatch.setattr("qwen3next_plugin.kernels.draft_head.quantise.CHUNK", 30 * 10)
    for chunked, expected in zip(quantise_channels(weight), whole, strict=True):
        assert torch.equal(chunked, expected)


def test_whatever_rows_share_the_batch(cpu_backend):
    """A row's result is the same bits alone, in any batch, and on one thread."""
    _, weight, scale = head(515, 130)
    x = torch.randn(256, 130).bfloat16()
    rows, values = draft_head(x=x, weight=weight, scale=scale)
    for size in (1, 2, 3, 5, 8, 64):
        part = draft_head(x=x[7 : 7 + size], weight=weight, scale=scale)
        assert torch.equal(part[0], rows[7 : 7 + size])
        assert torch.equal(part[1], values[7 : 7 + size])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = draft_head(x=x, weight=weight, scale=scale)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone[0], rows)
    assert torch.equal(alone[1], values)


def test_shards_add_up(cpu_backend):
    """The greatest of the shards' values (of equals, the lowest shard's) is the whole head's."""
    _, weight, scale = head(900, 64)
    x = torch.randn(17, 64).bfloat16()
    rows, values = draft_head(x=x, weight=weight, scale=scale)
    bounds = (0, 311, 312, 900)
    parts = [
        draft_head(x=x, weight=weight[a:b], scale=scale[a:b]) for a, b in itertools.pairwise(bounds)
    ]
    best = torch.stack([value for _, value in parts]).argmax(0)
    assert torch.equal(torch.stack([v for _, v in parts]).amax(0), values)
    offset = torch.tensor(bounds[:-1])[best]
    assert torch.equal(torch.stack([r for r, _ in parts]).gather(0, best[None])[0] + offset, rows)


@pytest.mark.parametrize("row", [0, 2, 5, 258, 3000])
def test_lowest_row_of_equals(cpu_backend, row):
    """Also if the equal values are in different blocks of rows."""
    weight = torch.randint(-50, 50, (3001, 40), dtype=torch.int8)
    weight[[row, 1500, 3000]] = 127
    rows, values = draft_head(x=torch.ones(3, 40), weight=weight, scale=torch.ones(3001))
    assert rows.tolist() == [min(row, 1500)] * 3
    torch.testing.assert_close(values, torch.full((3,), 127.0 * 40))


def test_every_score_negative(cpu_backend):
    weight = torch.randint(-128, 0, (100, 33), dtype=torch.int8)
    weight[41] = -1
    x = torch.rand(5, 33) + 0.1
    rows, values = draft_head(x=x, weight=weight, scale=torch.ones(100))
    assert rows.tolist() == [41] * 5
    torch.testing.assert_close(values, -x.sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("D", [1, 64, 2048, 16384])
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_integers_do_not_overflow(cpu_backend, D, sign):
    weight = torch.full((5, D), -128, dtype=torch.int8)
    weight[3] = 127
    x = torch.full((2, D), 7.5 * sign)
    rows, values = draft_head(x=x, weight=weight, scale=torch.ones(5))
    assert rows.tolist() == [3 if sign > 0 else 0] * 2
    torch.testing.assert_close(values, torch.full((2,), (127.0 if sign > 0 else 128.0) * 7.5 * D))


def test_an_outlier_leaves_the_rest_its_bits(cpu_backend):
    """With one value a hundred times the others, the others still decide."""
    _, weight, scale = head(400, 512)
    x = torch.randn(9, 512)
    x[:, 100] = 300.0
    weight[:, 100] = 1  # the outlier adds the same to each row, but for its scale
    scale[:] = 0.01
    rows, _ = draft_head(x=x, weight=weight, scale=scale)
    exact = (x.double() @ weight.double().T).argmax(1)
    assert torch.equal(rows, exact)


def test_zeros_and_what_is_not_finite(cpu_backend):
    _, weight, scale = head(300, 70)
    x = torch.randn(6, 70)
    alone = draft_head(x=x, weight=weight, scale=scale)
    x[1] = 0
    x[2, 69] = torch.nan
    x[4, 0] = torch.inf
    x[5, 3] = -torch.inf
    rows, values = draft_head(x=x, weight=weight, scale=scale)
    assert rows[[1, 2, 4, 5]].tolist() == [0] * 4
    assert values[1] == 0
    assert values[[2, 4, 5]].isnan().all()
    assert torch.equal(rows[[0, 3]], alone[0][[0, 3]])
    assert torch.equal(values[[0, 3]], alone[1][[0, 3]])


def test_refuses(cpu_backend):
    x, weight, scale = torch.zeros(3, 8), torch.zeros(5, 8, dtype=torch.int8), torch.ones(5)
    with pytest.raises(ValueError, match=r"draft_head: x is torch\.float64"):
        draft_head(x=x.double(), weight=weight, scale=scale)
    with pytest.raises(ValueError, match=r"draft_head: weight is torch\.float32"):
        draft_head(x=x, weight=weight.float(), scale=scale)
    with pytest.raises(ValueError, match="draft_head: weight has shape"):
        draft_head(x=x, weight=weight[:, :7], scale=scale)
    with pytest.raises(ValueError, match=r"draft_head: x has shape \(8,\), not 2 dims"):
        draft_head(x=x[0], weight=weight, scale=scale)
    with pytest.raises(ValueError, match=r"draft_head: weight has shape \(8,\), not 2 dims"):
        draft_head(x=x, weight=weight[0], scale=scale)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"draft_head: token_ids has shape \(1, 1\), not 1 dims"):
        draft_head(x=x, weight=weight, scale=scale, token_ids=ids)
    with pytest.raises(ValueError, match="draft_head: scale has shape"):
        draft_head(x=x, weight=weight, scale=scale[:4])
    with pytest.raises(ValueError, match=r"draft_head: scale is torch\.bfloat16"):
        draft_head(x=x, weight=weight, scale=scale.bfloat16())
    with pytest.raises(ValueError, match="not contiguous"):
        draft_head(x=x, weight=weight.t().contiguous().t(), scale=scale)
    with pytest.raises(ValueError, match="draft_head: token_ids is empty"):
        draft_head(x=x, weight=weight[:0], scale=scale[:0])
    with pytest.raises(ValueError, match=r"draft_head: token_ids is torch\.int64"):
        draft_head(x=x, weight=weight, scale=scale, token_ids=torch.tensor([1]))
    for row in (5, -1):
        message = rf"draft_head: token_ids\[1\] = {row} is not one of 5"
        with pytest.raises(RuntimeError, match=message):
            draft_head(x, weight, scale, torch.tensor([0, row], dtype=torch.int32))
    with pytest.raises(ValueError, match="quantise_channels: output channel 2"):
        quantise_channels(torch.tensor([[1.0], [2.0], [torch.nan]]))
