"""Chains of drafts: the MTP layer reads each draft to make the next one."""

from collections.abc import Callable, Sequence

from torch import Tensor

Pass = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def extend(lengths: Sequence[int], token_ids: Tensor, states: Tensor, run: Pass) -> list[list[int]]:
    """Extend the first drafts of N requests to chains, each with its own length.

    Args:
        lengths: drafts of each request, at least 1, in descending order, so that requests with
            further drafts come first.
        token_ids: the first drafts.
        states: what the MTP layer reads beside them.
        run: a pass over the first n requests at a depth, from 1 on: (depth, token_ids, states) →
            the next drafts, and what the next pass reads.

    Shapes:
        token_ids [N, …] with one token each, states [N, …]; of `run`: the same with n for N
    """
    drafts = [[token] for token in token_ids.flatten().tolist()]
    for depth in range(1, max(lengths, default=0)):
        n = sum(length > depth for length in lengths)
        token_ids, states = run(depth, token_ids[:n], states[:n])
        for chain, token in zip(drafts, token_ids.flatten().tolist(), strict=False):
            chain.append(token)
    return drafts
