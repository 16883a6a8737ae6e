"""Draft trees: laid out and verified greedily, against plain loops."""

import random
from importlib import import_module

import pytest
import torch

from engines.sglang.trees import Tree, chain, linked, random_tree
from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide

provide()
kernels = import_module("sgl_kernel")
SIZES = [(1, 1), (2, 1), (4, 1), (5, 2), (9, 3), (16, 4)]


def candidates_of(rng: random.Random, topk: int, depth: int, D: int):
    """parent_list and selected_index of one request, as the host's draft loop scores them.

    Group 0 continues the root; each later step has topk groups, one for each survivor.
    """
    parent_list = [-1]
    step = list(range(topk))  # candidates of the last step
    everything = list(step)
    for level in range(1, depth):
        survivors = rng.sample(step, min(topk, len(step)))
        parent_list += survivors
        base = topk + (level - 1) * topk * topk
        step = [base + group * topk + c for group in range(topk) for c in range(topk)]
        everything += step
    closed: list[int] = []
    while len(closed) < D - 1:  # a node's parent is a node, mostly
        open_ = [c for c in everything if c not in closed and parent(parent_list, c, topk, closed)]
        closed.append(rng.choice(open_))
    return parent_list, sorted(closed)


def parent(parent_list, candidate, topk, selected) -> bool:
    group = candidate // topk
    return group == 0 or parent_list[group] in selected


def tree_of(parent_list, selected, topk) -> Tree:
    parents = [-1]
    for candidate in selected:
        group = candidate // topk
        continued = 0 if group == 0 else selected.index(parent_list[group]) + 1
        parents.append(continued)
    return Tree(parents)


def built(inputs, topk, depth, D, seq_lens, mode):
    """The operator's outputs on fresh buffers, canaries behind mask and positions."""
    N = len(inputs)
    parent_list = torch.tensor([p for p, _ in inputs]) if N else torch.zeros(0, 4).long()
    selected = torch.tensor([s for _, s in inputs], dtype=torch.int64).view(N, D - 1)
    cells = sum(D * (D + (n if mode == 0 else 0)) for n in seq_lens)
    mask = torch.full((cells + 5,), True)
    positions = torch.full((N * D + 5,), -77)
    index, first, sibling = torch.full((3, N, D), -1)
    kernels.build_tree_kernel_efficient_cpu(
        parent_list, selected, torch.tensor(seq_lens, dtype=torch.int64), mask, positions,
        index, first, sibling, topk, depth, D, mode,
    )  # fmt: skip
    assert mask[cells:].all()
    assert (positions[N * D :] == -77).all()
    return mask[:cells], positions[: N * D], index, first, sibling


@pytest.mark.parametrize("mode", [0, 1], ids=["full mask", "qlen only"])
@pytest.mark.parametrize(("D", "topk"), SIZES)
@pytest.mark.parametrize("N", [0, 1, 3])
def test_tree(N, D, topk, mode):
    rng = random.Random(D * 10 + topk)
    depth = D - 1 if topk == 1 else 3
    inputs = [candidates_of(rng, topk, max(depth, 1), D) for _ in range(N)]
    seq_lens = [rng.randint(0, 6) for _ in range(N)]
    mask, positions, index, first, sibling = built(inputs, topk, depth, D, seq_lens, mode)
    trees = [tree_of(*given, topk) for given in inputs]
    expected = linked(trees) if N else (index, first, sibling)
    for got, want in zip((index, first, sibling), expected, strict=True):
        assert torch.equal(got, want)
    at = 0
    for tree, n, request in zip(trees, seq_lens, range(N), strict=True):
        for node in range(D):
            prefix = n if mode == 0 else 0
            row = mask[at : at + prefix + D].tolist()
            seen = {0, *tree.ancestors(node)}
            assert row == [True] * prefix + [other in seen for other in range(D)]
            assert positions[request * D + node] == n + len(tree.ancestors(node))
            at += prefix + D


def test_a_parent_that_was_not_selected():
    """Such a node hangs in the air: no link leads to it, and it sees the root and itself."""
    mask, positions, _, first, sibling = built([([-1, 0, 1], [1, 2, 3])], 2, 3, 4, [5], 1)
    assert first.tolist() == [[1, -1, -1, -1]]  # 2 and 3 continue candidate 0
    assert sibling.tolist() == [[-1, -1, -1, -1]]
    assert positions.tolist() == [5, 6, 6, 6]
    assert mask.view(4, 4)[2].tolist() == [True, False, True, False]


def test_other_masks_are_refused():
    with pytest.raises(NotImplementedError, match="tree mask mode 2"):
        built([([-1], [0])], 1, 1, 2, [3], 2)


def greedy_walk(tree, tokens, target, S):
    """Nodes accepted below the root."""
    path, node = [], 0
    while len(path) < S - 1:
        right = [c for c in tree.children(node) if tokens[c] == target[node]]
        if not right:
            break
        node = right[0]
        path.append(node)
    return path


@pytest.mark.parametrize(("D", "topk"), SIZES)
@pytest.mark.parametrize("N", [0, 1, 7])
def test_verify(N, D, topk):
    rng = random.Random(D + topk)
    S = max(2, D // topk)
    trees = [chain(D) if topk == 1 else random_tree(rng, D, topk) for _ in range(N)]
    tokens, target = torch.randint(0, 3, (N, D)), torch.randint(0, 3, (N, D))
    predicts = torch.full((N * D + 2,), -77, dtype=torch.int32)
    accept_index = torch.full((N, S), -1, dtype=torch.int32)
    accepted = torch.full((N,), -77, dtype=torch.int32)
    index, first, sibling = linked(trees) if N else torch.zeros(3, 0, D, dtype=torch.int64)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts, accept_index=accept_index, accept_token_num=accepted,
        candidates=tokens, retrive_index=index, retrive_next_token=first,
        retrive_next_sibling=sibling, target_predict=target,
    )  # fmt: skip
    expected = torch.full_like(predicts, -77)
    for i, tree in enumerate(trees):
        path = [0, *greedy_walk(tree, tokens[i].tolist(), target[i].tolist(), S)]
        assert accepted[i] == len(path) - 1
        assert accept_index[i].tolist() == [i * D + n for n in path] + [-1] * (S - len(path))
        for node in path:
            expected[i * D + node] = target[i, node]
    assert torch.equal(predicts, expected)
