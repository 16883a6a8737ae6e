"""Our experts under vLLM's expert parallelism: each rank's share of the sum."""

import torch

from qwen3next_plugin.engines.vllm.cpu import experts

T, D, E, F, k = 7, 16, 6, 8, 3


def run(x, w13, w2, weights, ids, expert_map=None):
    out = torch.empty_like(x)
    experts.NativeExperts.apply(
        None, out, x, w13, w2, weights, ids, experts.MoEActivation.SILU, E, expert_map
    )
    return out


def test_ranks_sum_to_all_experts():
    torch.manual_seed(1)
    x, w13, w2 = torch.randn(T, D), torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    weights = torch.rand(T, k)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(T)]).int()
    whole, parts = run(x, w13, w2, weights, ids), torch.zeros(T, D)
    for mine in ((0, 2, 5), (1, 3, 4), ()):
        expert_map = torch.full((E,), -1, dtype=torch.int32)
        expert_map[list(mine)] = torch.arange(len(mine), dtype=torch.int32)
        parts += run(x, w13[list(mine)], w2[list(mine)], weights, ids, expert_map)
    torch.testing.assert_close(parts, whole)
