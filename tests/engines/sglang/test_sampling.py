"""Rejection sampling over trees of drafts: lossless, and equal to a plain walk for equal coins."""

import random

import pytest
import torch

from engines.sglang.trees import Tree, chain, linked, random_tree
from qwen3next_plugin.engines.sglang.speculation.sampling import (
    top_k_renorm_prob,
    tree_speculative_sampling_target_only,
)

CANARY = -77


def sample(trees, tokens, target, coins, final, S, **thresholds):
    """(predicts, accept_index, accepted) of a batch."""
    N, D = tokens.shape
    predicts = torch.full((N * D + 2,), CANARY, dtype=torch.int32)
    accept_index = torch.full((N, S), -1, dtype=torch.int32)
    accepted = torch.full((N,), CANARY, dtype=torch.int32)
    index, first, sibling = trees
    tree_speculative_sampling_target_only(
        predicts=predicts, accept_index=accept_index, accept_token_num=accepted,
        candidates=tokens, retrive_index=index, retrive_next_token=first,
        retrive_next_sibling=sibling, uniform_samples=coins,
        uniform_samples_for_final_sampling=final, target_probs=target,
        draft_probs=torch.zeros_like(target), deterministic=True,
        **({"threshold_single": 1.0, "threshold_acc": 1.0} | thresholds),
    )  # fmt: skip
    assert (predicts[-2:] == CANARY).all()
    return predicts[:-2].view(N, D), accept_index, accepted


def walk(tree, tokens, target, coins, final, S, threshold_single=1.0, threshold_acc=1.0):
    """One request, as plain Python: (accepted nodes, the tokens that follow them)."""
    path, emitted = [0], []
    while True:
        node, mass, left = path[-1], 0.0, list(target[path[-1]])
        for child in tree.children(node) if len(path) < S else ():
            mass += left[tokens[child]]
            single = left[tokens[child]] >= threshold_single
            if coins[node] < mass / threshold_acc or single:
                path.append(child)
                emitted.append(tokens[child])
                break
            left[tokens[child]] = 0.0
        else:
            left = left if sum(left) else list(target[node])
            wanted, reached = final * sum(left), 0.0
            for token, share in enumerate(left):
                reached += share
                if reached > wanted:
                    return path, [*emitted, token]


def dyadic(*shape: int) -> torch.Tensor:
    """Distributions of multiples of 1/64, zeros among them: sums of them are exact."""
    *rows, V = shape
    counts = torch.zeros(shape)
    return counts.scatter_add_(-1, torch.randint(0, V, (*rows, 64)), torch.ones(*rows, 64)) / 64


@pytest.mark.parametrize("thresholds", [{}, {"threshold_acc": 0.5, "threshold_single": 0.25}])
@pytest.mark.parametrize(("D", "topk"), [(1, 1), (2, 1), (5, 1), (5, 2), (9, 3), (12, 4)])
@pytest.mark.parametrize("N", [0, 1, 61])
def test_equals_a_plain_walk(N, D, topk, thresholds):
    """Coins of 1/64 too: one that equals a sum of probabilities is at its exclusive end."""
    torch.manual_seed(D)
    rng, V, S = random.Random(D), 6, max(2, D // topk)
    trees = [chain(D) if topk == 1 else random_tree(rng, D, topk) for _ in range(N)]
    tokens, target = torch.randint(0, V, (N, D)), dyadic(N, D, V)
    coins, final = torch.randint(0, 64, (N, D)) / 64, torch.randint(0, 64, (N,)) / 64
    links = linked(trees) if N else torch.zeros(3, 0, D, dtype=torch.int64)
    predicts, accept_index, accepted = sample(links, tokens, target, coins, final, S, **thresholds)
    for i, tree in enumerate(trees):
        path, emitted = walk(
            tree, tokens[i].tolist(), target[i].tolist(), coins[i].tolist(), float(final[i]), S,
            **thresholds,
        )  # fmt: skip
        assert accepted[i] == len(path) - 1
        assert accept_index[i].tolist() == [i * D + n for n in path] + [-1] * (S - len(path))
        assert predicts[i, path].tolist() == emitted
        others = [n for n in range(D) if n not in path]
        assert (predicts[i, others] == CANARY).all()


def many(tree: Tree, tokens: torch.Tensor, target: torch.Tensor, N: int, S: int):
    """The same tree N times, with fresh coins."""
    D = len(tree.parents)
    index, first, sibling = linked([tree])
    links = index + D * torch.arange(N)[:, None], first.expand(N, D), sibling.expand(N, D)
    probs = target.expand(N, *target.shape).clone()
    return sample(links, tokens.expand(N, D), probs, torch.rand(N, D), torch.rand(N), S)


def assert_distributed(counts: torch.Tensor, probs: torch.Tensor) -> None:
    """Chi-square within six standard deviations; nothing where the probability is zero."""
    assert (counts[probs == 0] == 0).all()
    counts, probs = counts[probs > 0].double(), probs[probs > 0].double()
    expected = counts.sum() * probs
    freedom = len(probs) - 1
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 <= freedom + 6 * max(1, 2 * freedom) ** 0.5


TREES = {
    "chain": (chain(4), [0, 1, 2, 3]),
    "topk 2": (Tree([-1, 0, 0, 1, 1, 2, 3]), [0, 1, 2, 3, 4, 0, 1]),
    "topk 3": (Tree([-1, 0, 0, 0, 2, 2, 2, 5]), [0, 4, 1, 2, 3, 0, 1, 2]),
    "equal siblings": (Tree([-1, 0, 0, 0, 2]), [0, 1, 1, 3, 2]),
}


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("zeros", [False, True], ids=["", "zeros"])
def test_lossless(shape, zeros):
    """What follows every node that is reached is distributed as the target says there."""
    torch.manual_seed(3)
    tree, tokens = TREES[shape]
    V, N, D = 5, 60_000, len(tokens)
    target = torch.rand(D, V).softmax(-1)
    if zeros:
        target[:, ::2] = torch.where(torch.rand(D, 3) < 0.5, 0, target[:, ::2])
        target /= target.sum(-1, keepdim=True)
    predicts, accept_index, accepted = many(tree, torch.tensor(tokens), target, N, D)
    assert 0 < accepted.float().mean() < D - 1  # partial acceptance
    reached = torch.zeros(N, D, dtype=torch.bool)
    request = torch.arange(N)[:, None].expand_as(accept_index)[accept_index >= 0]
    reached[request, accept_index[accept_index >= 0] % D] = True
    for node in range(D):
        emitted = predicts[reached[:, node], node].long()
        if len(emitted) > 500:
            assert_distributed(emitted.bincount(minlength=V), target[node])


def test_exact_on_a_grid_of_coins():
    """Three siblings, every pair of coins: the token's share is its probability."""
    M, V = 256, 5
    target = torch.tensor([[0.1, 0.3, 0.05, 0.35, 0.2]]).expand(4, V)
    grid = (torch.arange(M) + 0.5) / M
    index, first, sibling = linked([Tree([-1, 0, 0, 0])])
    N = M * M
    links = index + 4 * torch.arange(N)[:, None], first.expand(N, 4), sibling.expand(N, 4)
    coins = torch.zeros(N, 4)
    coins[:, 0] = grid.repeat_interleave(M)
    tokens = torch.tensor([0, 3, 1, 0]).expand(N, 4)
    predicts, *_ = sample(links, tokens, target.expand(N, 4, V).clone(), coins, grid.repeat(M), 2)
    share = predicts[:, 0].long().bincount(minlength=V) / N
    assert (share - target[0]).abs().max() <= 1 / M


def test_greedy_in_the_limit():
    """One-hot targets: the drafts that are right are accepted, and the right token follows."""
    torch.manual_seed(0)
    tree, D, V = Tree([-1, 0, 0, 2, 2, 4]), 6, 7
    best = torch.tensor([5, 0, 6, 1, 2, 3])
    tokens = torch.tensor([0, 1, 5, 0, 6, 4])  # right: 2 behind 0, 4 behind 2
    target = torch.nn.functional.one_hot(best, V).float()
    predicts, accept_index, accepted = many(tree, tokens, target, 500, D)
    assert (accepted == 2).all()
    assert (accept_index[:, :3] % D == torch.tensor([0, 2, 4])).all()
    assert (predicts[:, [0, 2, 4]] == torch.tensor([5, 6, 2])).all()


@pytest.mark.parametrize("coin", [0.0, 1 - 2**-24, 1.0])
def test_extreme_coins_give_no_token_without_probability(coin):
    target = torch.tensor([[[0, 0.25, 0, 0.75, 0]] * 3])
    tokens, coins = torch.tensor([[0, 2, 4]]), torch.full((1, 3), coin)
    predicts, _, accepted = sample(
        linked([Tree([-1, 0, 0])]), tokens, target, coins, torch.tensor([coin]), 3
    )
    assert accepted.item() == 0
    assert predicts[0, 0] == (1 if coin == 0 else 3)


def test_all_of_the_probability_rejected():
    """The drafts' probabilities sum to the coin, rounded; a token of the target comes."""
    target = torch.tensor([[[0.5, 0.5 - 2**-24, 0]] * 3])
    coins = torch.full((1, 3), 1 - 2**-24)
    tokens = torch.tensor([[0, 0, 1]])
    predicts, _, accepted = sample(
        linked([Tree([-1, 0, 0])]), tokens, target, coins, torch.tensor([0.9]), 3
    )
    assert accepted.item() == 0
    assert predicts[0, 0] in (0, 1)


def test_nan_is_refused():
    target = torch.full((1, 1, 4), float("nan"))
    with pytest.raises(ValueError, match="without probability"):
        sample(linked([Tree([-1])]), torch.zeros(1, 1).long(), target, torch.zeros(1, 1),
               torch.zeros(1), 2)  # fmt: skip


def kept_by_loop(row: list[float], size: int) -> set[int]:
    return set(sorted(range(len(row)), key=lambda token: -row[token])[:size])


def renormalised(row: torch.Tensor, kept: set[int]) -> torch.Tensor:
    mask = torch.tensor([token in kept for token in range(len(row))])
    return torch.where(mask, row, 0) / row[mask].sum()


def limits(top_k, top_p, min_p) -> torch.Tensor:
    """[N, 3] of what is given for each row, or for all."""
    columns = [torch.as_tensor(each).double() for each in (top_k, top_p, min_p)]
    return torch.stack(torch.broadcast_tensors(*columns), dim=-1)


@pytest.mark.parametrize("V", [1, 7, 1001])
def test_top_k(V):
    """Equal probabilities too: the lower index stays, as argmax has it."""
    probs = dyadic(9, V)
    top_ks = [1, 2, 3, V, V + 1, 1 << 30, 5, max(1, V - 1), 1]
    got = top_k_renorm_prob(probs, limits(top_ks, 1, 0))
    for row, size, out in zip(probs, top_ks, got, strict=True):
        want = row if size >= V else renormalised(row, kept_by_loop(row.tolist(), size))
        assert torch.allclose(out, want, atol=1e-6, rtol=0)
        assert (out > 0).sum() <= size
    assert got[0].argmax() == probs[0].argmax()


def test_top_p_keeps_the_token_that_begins_where_it_ends():
    probs = torch.tensor([[0.25, 0.5, 0.25]]).expand(4, 3)
    got = top_k_renorm_prob(probs, limits(9, [0.4, 0.5, 0.75, 0.8], 0))
    assert (got > 0).sum(1).tolist() == [1, 2, 3, 3]


def plain(probs, top_ks, top_ps, min_ps) -> torch.Tensor:
    """The distribution that SGLang's plain sampler on a CPU draws from."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    _, weights, tokens, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        probs.clone(), top_ks, top_ps, min_ps, bool((min_ps > 0).any()), None,
        torch.zeros(len(probs)), return_filtered_probs=True,
    )  # fmt: skip
    kept = torch.zeros_like(probs).scatter_(1, tokens.long(), weights)
    return kept / kept.sum(1, keepdim=True)


def some_limits(N: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """top_ks, top_ps and min_ps of N requests, alone and together; none without any."""
    rng = random.Random(N)
    top_ks = torch.tensor([rng.choice([1, 2, 20, 300, 1 << 30]) for _ in range(N)]).int()
    top_ps = torch.tensor([rng.choice([0.1, 0.5, 0.8, 0.95, 0.999]) for _ in range(N)])
    min_ps = torch.tensor([rng.choice([0, 0.01, 0.1, 0.7]) for _ in range(N)])
    return top_ks, top_ps, min_ps


@pytest.mark.parametrize("sharp", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("V", [1, 7, 3001, 50_000])
def test_limits_are_those_of_plain_decoding(V, sharp):
    """Flat distributions too, of which more is kept than is looked at first."""
    torch.manual_seed(V)
    N = 40
    probs = (sharp * torch.randn(N, V, dtype=torch.float64)).softmax(-1).float()
    top_ks, top_ps, min_ps = some_limits(N)
    got = top_k_renorm_prob(probs, limits(top_ks, top_ps, min_ps))
    want = plain(probs, top_ks, top_ps, min_ps)
    distinct = [len(row.unique()) == V for row in probs]  # of equals the host keeps any
    assert torch.equal((got > 0)[distinct], (want > 0)[distinct])
    assert torch.equal((got > 0).sum(1), (want > 0).sum(1))
    assert torch.allclose(got.sort(1).values, want.sort(1).values, atol=1e-6, rtol=1e-5)


def test_rows_without_limits_are_not_copied():
    probs = dyadic(3, 7)
    unlimited = limits(1 << 30, 1, 0).expand(3, 3)
    assert top_k_renorm_prob(probs, unlimited) is probs
    assert top_k_renorm_prob(probs[:0], unlimited[:0]).shape == (0, 7)
