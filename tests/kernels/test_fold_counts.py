"""The kernels write S exactly when a page's span passes a grid point."""

import random

import pytest
import torch
from state_pages import SMALL, Layer, Pool, Step

from qwen3next_plugin.kernels.step import GRID


@pytest.mark.parametrize("num_drafts", [0, 1, 3, 8])
def test_s_is_written_once_for_each_grid_point_passed(num_drafts):
    rng = random.Random(num_drafts)
    torch.manual_seed(num_drafts)
    layer, pool = Layer.random(SMALL), Pool(SMALL, 1, num_drafts)
    c, seen = 0, set()
    for _ in range(150):
        n = rng.choice([*range(1, num_drafts + 2), *range(1, num_drafts + 2), 9, 40])
        committed = rng.randint(1, n) if n <= num_drafts + 1 else n
        if rng.random() < 0.05:  # preempted: starts again, or from a copy of the page
            c = rng.choice([0, pool.span_[0, 1].item() if c else 0])
        stood = pool.span_[0, 0].item() // GRID if c else 0
        before = pool.state_[0].clone()
        layer.run(pool, Step(((0, c, n),)), layer.projections(n))
        written = not torch.equal(before.view(torch.int32), pool.state_[0].view(torch.int32))
        # A short row may be rolled back to where it begins.
        start = c if n <= num_drafts + 1 else c + n
        assert pool.span_[0].tolist() == [start, c + n]
        assert written == (start // GRID > stood), (c, n)
        seen.add(written)
        c += committed
    assert seen == {True, False}
