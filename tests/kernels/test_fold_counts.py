"""The drafter's count of folds is how often the kernels write S."""

import random

import pytest
import torch
from state_pages import SMALL, Layer, Pool, Step

from qwen3next_plugin.mtp.metrics import Folds


@pytest.mark.parametrize("k", [0, 1, 3, 8])
def test_a_fold_is_counted_where_s_is_written(k):
    rng = random.Random(k)
    torch.manual_seed(k)
    layer, pool, folds = Layer.random(SMALL), Pool(SMALL, 1, k), Folds(k)
    c, seen = 0, set()
    for _ in range(150):
        n = rng.choice([*range(1, k + 2), *range(1, k + 2), 9, 40])
        committed = rng.randint(1, n) if n <= k + 1 else n
        if rng.random() < 0.05:  # preempted: starts again, or from a copy of the page
            resumed = rng.choice([0, pool.span_[0, 1].item() if c else 0])
            c = resumed
        before = pool.state_[0].clone()
        layer.run(pool, Step(((0, c, n),)), layer.projections(n))
        written = not torch.equal(before.view(torch.int32), pool.state_[0].view(torch.int32))
        counted = folds.row("request", c, n, committed)
        assert counted == written, (c, n)
        seen.add(written)
        c += committed
    assert seen == {True, False}
