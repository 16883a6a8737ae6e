"""Outputs and pages have the same bits however tokens are grouped into steps."""

import random

import pytest
import torch
from state_pages import SHAPES, Layer, Pool, Shape, Step, concatenated, rows_of

from qwen3next_plugin.kernels.step import GRID

T, DRAFTS = 5 * GRID + 3, 3


class Run:
    """One request's tokens through a page, in any groups."""

    def __init__(self, layer, x, drafts, state_dtype, num_drafts=DRAFTS):
        self.layer, self.x, self.drafts = layer, x, drafts
        self.pool = Pool(layer.shape, 1, num_drafts, x["q"].dtype, state_dtype)

    def __call__(self, groups) -> tuple[torch.Tensor, ...]:
        """Each group: how many tokens are kept, and how many rejected drafts follow them."""
        outs, at = [], 0
        for n, rejected in groups:
            tokens = concatenated(
                rows_of(self.x, at, at + n), rows_of(self.drafts, at, at + rejected)
            )
            outs.append(self.layer.run(self.pool, Step(((0, at, n + rejected),)), tokens)[:n])
            at += n
        assert at == len(self.x["q"])
        self.layer.run(self.pool, Step(((0, at, 0),)), rows_of(self.x, 0, 0))  # folds what is due
        return torch.cat(outs), *self.pool.content(0)


def assert_same(ours, expected):
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(params=[SHAPES[1], SHAPES[3]], ids=str)
def request_on(request, dtype, state_dtype):
    layer = Layer.random(request.param, dtype)
    x, drafts = layer.projections(T, dtype), layer.projections(T + DRAFTS, dtype)
    return lambda num_drafts=DRAFTS: Run(layer, x, drafts, state_dtype, num_drafts)


def in_groups_of(n: int, tokens: int = T) -> list[tuple[int, int]]:
    return [(n, 0)] * (tokens // n) + [(tokens % n, 0)] * (tokens % n > 0)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits(bits_level, request_on):
    one_by_one = request_on()(in_groups_of(1))
    for n in (2, 3, 4):  # verified together, all right
        assert_same(request_on()(in_groups_of(n)), one_by_one)
    assert_same(request_on()([(1, DRAFTS)] * T), one_by_one)  # all drafts wrong
    assert_same(request_on(num_drafts=0)(in_groups_of(1))[0], one_by_one[0])  # no room for drafts
    for n in (5, 7, GRID, GRID + 1, 2 * GRID, 21, T):  # prefill chunks
        assert_same(request_on()(in_groups_of(n)), one_by_one)
    for first in range(T + 1):  # a prompt in two chunks
        assert_same(request_on()([(first, 0), (T - first, 0)]), one_by_one)
    for first in (GRID - 1, 3 * GRID, T - 5):  # a prompt, then decode
        assert_same(request_on()([(first, 0)] + [(1, 0)] * (T - first)), one_by_one)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_same_bits_in_random_groups(bits_level, request_on):
    expected = request_on()([(T, 0)])
    generator = random.Random(7)
    for _ in range(40):
        groups, at = [], 0
        while at < T:
            n = min(generator.choice((0, 1, 1, 2, 3, 4, 5, 11, 19)), T - at)
            rejected = generator.randint(0, DRAFTS + 1 - n) if n <= DRAFTS else 0
            groups.append((n, rejected))
            at += n
        assert_same(request_on()(groups), expected)


@pytest.mark.parametrize("state_dtype", [torch.float32], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_same_bits_with_drafts_longer_than_a_cell(bits_level, request_on):
    num_drafts = 2 * GRID + 1
    run = request_on(num_drafts)
    run.drafts = concatenated(run.drafts, run.drafts)
    groups = [
        (5, 0),
        (1, num_drafts),
        (num_drafts + 1, 0),
        (4, num_drafts - 3),
        (0, num_drafts),
        (2, 0),
    ]
    groups.append((T - sum(n for n, _ in groups), 0))
    assert_same(run(groups)[0], request_on()([(T, 0)])[0])


@pytest.mark.parametrize("state_dtype", [torch.float32], ids="S={}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_same_bits_beside_other_rows(bits_level, request_on):
    """A row's bits do not depend on the rest of the batch."""
    alone = request_on()
    expected = alone(in_groups_of(2))[0]
    layer, x = alone.layer, alone.x
    pool, outs = Pool(layer.shape, 3, DRAFTS, x["q"].dtype), []
    other = layer.projections(60, x["q"].dtype)
    for t in range(0, T - 1, 2):
        batch = concatenated(rows_of(other, 0, 9), rows_of(x, t, t + 2), rows_of(other, 9, 10))
        step = Step(((0, 0, 9), (2, t, 2), (-1, 0, 1)))
        outs.append(layer.run(pool, step, batch)[9:11])
    assert_same([torch.cat(outs)], [expected[: T - 1]])


@pytest.mark.parametrize(
    "state_dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)],
    ids="S={}".format,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_decode_and_verify_have_the_same_bits_on_a_gpu(backend, dtype, state_dtype, size):
    """Equal bits one by one, verified together or after rejected drafts; prefill is close."""
    layer, tokens = Layer.random(Shape(1, 2, 16, 24), dtype), size(GRID + 7, T)
    x, drafts = layer.projections(tokens, dtype), layer.projections(tokens + DRAFTS, dtype)

    def run(groups):
        return Run(layer, x, drafts, state_dtype)(groups)

    one_by_one = run(in_groups_of(1, tokens))
    assert_same(run(in_groups_of(3, tokens)), one_by_one)
    mixed = [(1, DRAFTS), (2, 1), (4, 0), (3, 1), (1, 0)]
    groups = mixed * (tokens // 11) + [(1, 2)] * (tokens % 11)
    assert_same(run(groups), one_by_one)
