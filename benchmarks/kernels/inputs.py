"""Inputs of a linear-attention layer at the released model's shapes, and pages to walk over.

Calls walk over PAGES pages, so that neither side finds its state in the nearest cache.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID, Step

H, HV, K, V, DTYPE = 16, 32, 128, 128, torch.bfloat16
R = HV // H * V
C = H * (2 * K + R)
DRAFT = 3  # draft tokens of a verify step
ACCEPTED = 2  # of them, in every verify step
PAGES = 32  # 67 MB of state


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def layer_inputs(tokens: int) -> dict[str, Tensor]:
    """q, k, v, b, a as views of two grouped projections, as a layer has them."""
    qkvz = torch.randn(tokens, H, 2 * K + 2 * R).to(DTYPE)
    q, k, v, _ = qkvz.split([K, K, R, R], dim=-1)
    b, a = torch.randn(tokens, H, 2 * (HV // H)).to(DTYPE).chunk(2, dim=-1)
    return {"q": q, "k": k, "v": v, "a": a, "b": b}


def mixed(x: dict[str, Tensor]) -> Tensor:
    """The contiguous [T, C] copy that upstream's layer makes for its convolution."""
    return torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1)


def parameters() -> tuple[Tensor, Tensor]:
    """A_log in fp32, dt_bias in the activations' dtype, as upstream takes them."""
    return torch.empty(HV).uniform_(1, 16).log(), torch.randn(HV).to(DTYPE)


def state_pool(num_drafts: int) -> StatePool:
    """The plugin's pages."""
    window = GRID + num_drafts
    return StatePool(
        state=torch.zeros(PAGES, HV, K, V),
        key=torch.zeros(PAGES, window, H, K),
        u=torch.zeros(PAGES, window, HV, V),
        g=torch.zeros(PAGES, window, HV),
        span=torch.zeros(PAGES, 2, dtype=torch.int32),
        conv=torch.zeros(PAGES, 4 + num_drafts, C, dtype=DTYPE),
    )


def step_of(starts: Tensor, slot: Tensor, context_len: Tensor, n: int) -> Step:
    """A step whose rows have n tokens each."""
    return Step(starts, slot, context_len, num_tokens=n * len(slot), max_query_len=n)


def every_slot(batch: int) -> tuple[Tensor, ...]:
    """All pages, in groups of one call's batch."""
    return torch.arange(PAGES, dtype=torch.int32).split(batch)


def slots_in_turn(batch: int) -> Iterator[Tensor]:
    """The pages of each call in turn."""
    return itertools.cycle(every_slot(batch))


def turns(batch: int, advance: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(slots, context lengths) of each call in turn."""
    for round_ in itertools.count():
        context_len = torch.full((batch,), round_ * advance, dtype=torch.int32)
        for slots in every_slot(batch):
            yield slots, context_len


def spans_in_turn(batch: int, n: int, advance: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(slots, context lengths, spans) of each call in turn, around the ring.

    In a layer the recurrence advances the spans; the convolution alone does not.
    """
    ring, rounds = 3 + n, []
    for i in range(ring):
        c = ring + i * advance % ring
        span = int32(c - advance, c - advance + n).expand(PAGES, 2).contiguous()
        rounds.append((torch.full((batch,), c, dtype=torch.int32), span))
    for context_len, span in itertools.cycle(rounds):
        for slots in every_slot(batch):
            yield slots, context_len, span
