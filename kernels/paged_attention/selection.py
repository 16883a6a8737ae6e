"""Which positions a query of sparse attention sees."""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import INT, check


class Selection(NamedTuple):
    """For each query: some blocks of positions, and all positions from `tail` to its own.

    Block b has positions b · block_size to (b + 1) · block_size.

    Shapes: blocks [T, B] int32, any stride of dim 0, rising, -1 after the last; tail [T] int32, not
        before the blocks' end
    """

    blocks: Tensor
    tail: Tensor
    block_size: int


def check_selection(op: str, selection: Selection, T: int, device: torch.device) -> None:
    """Raise ValueError unless it is one of T queries."""
    blocks, tail, block_size = selection
    if blocks.dim() != 2 or block_size < 1:
        raise ValueError(f"{op}: blocks {tuple(blocks.shape)} of {block_size} positions")
    check(op, "blocks", blocks, (T, blocks.shape[1]), INT, device)
    check(op, "tail", tail, (T,), INT, device)


def selected(sees: Tensor, selection: Selection, begin: int) -> Tensor:
    """What the queries of a row see, of what they would see without a selection.

    Shapes: sees [n, S], of the tokens from `begin` on; returns the same

    Raises: RuntimeError naming the token if it does not have what is selected.
    """
    blocks, tail, size = selection
    n, S = sees.shape
    chosen = torch.zeros_like(sees)
    for j in range(n):
        listed, end, position = blocks[begin + j].tolist(), int(tail[begin + j]), S - n + j
        rising = _rising(listed)
        after = (rising[-1] + 1) * size if rising else 0
        if max(listed[len(rising) :][:1], default=-1) >= 0 or not after <= end <= position + 1:
            raise RuntimeError(
                f"token {begin + j}: at position {position} it cannot see {len(rising)} blocks"
                f" before position {after} and all from {end} on"
            )
        for b in rising:
            chosen[j, b * size : (b + 1) * size] = True
        chosen[j, end:] = True
    return sees & chosen


def _rising(listed: list[int]) -> list[int]:
    """The blocks before the first that is not above all before it."""
    for i, b in enumerate(listed):
        if b <= max(listed[:i], default=-1):
            return listed[:i]
    return listed
