"""Chains of drafts: the MTP layer reads each draft to make the next one."""

from collections.abc import Callable, Sequence

from torch import Tensor

Pass = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


def extend(lengths: Sequence[int], token_ids: Tensor, states: Tensor, run: Pass) -> list[list[int]]:
    """The drafts of N requests, each with its own number of them.

    Args:
        lengths: how many drafts each request has, at least 1 and falling, so that those that go on
            are the first ones.
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
