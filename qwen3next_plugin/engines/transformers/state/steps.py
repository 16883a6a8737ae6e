"""The columns, positions, masks and rows of a step, as the host's layers and ours take them."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qwen3next_plugin.kernels import step as kernels


@dataclass(frozen=True, slots=True)
class Step:
    """n tokens of each row, from its own column on.

    A row's tokens have columns from 0, padding included. `end` is behind the last column of any.
    Shapes: columns, positions [B, n]; attend [B, 1, n, end], or None: everything before
    """

    columns: Tensor
    positions: Tensor
    attend: Tensor | None
    end: int
    uniform: bool  # all rows have the same columns
    linear: kernels.Step  # as linear layers take it

    def linear_on(self, device: torch.device) -> kernels.Step:
        """`linear` where a layer is: `device_map` may spread them."""
        step = self.linear
        if step.slot.device == device:
            return step
        return replace(
            step,
            query_start_loc=step.query_start_loc.to(device),
            slot=step.slot.to(device),
            context_len=step.context_len.to(device),
        )


class StepBuilder:
    """Builds the steps of a batch."""

    def __init__(
        self, positions: Tensor, padding: list[int], *, additive: torch.dtype | None
    ) -> None:
        """`padding` is each prompt's number of columns before its first token.

        `additive`: the dtype of masks that are added to scores; None: they are booleans.

        Shapes: positions [B, T] of the prompts
        """
        self.positions, self.padding = positions, padding
        self.additive = additive

    def prompt(self) -> Step:
        """The prompts themselves."""
        B, T = self.positions.shape
        columns = torch.arange(T, device=self.positions.device).expand(B, T)
        causal = not any(self.padding) and self.additive is None  # sdpa's own flag says it
        attend = None if causal else self._attend(columns, T)
        rows = []
        for slot, padding in enumerate(self.padding):
            rows += [(kernels.NULL_SLOT, padding, 0), (slot, T - padding, 0)]
        return Step(columns, self.positions, attend, T, uniform=True, linear=self._linear(rows))

    def build(self, starts: list[int], n: int) -> Step:
        """n tokens from column starts[b] of row b on, behind its prompt's first token."""
        T, device = self.positions.shape[1], self.positions.device
        uniform, end = min(starts) == max(starts), max(starts) + n
        first = torch.tensor(starts, device=device)[:, None]
        columns = first + torch.arange(n, device=device)  # [B, n]
        positions = columns + self.positions[:, -1:] - (T - 1)
        plain = uniform and n == 1 and not any(self.padding)
        attend = None if plain else self._attend(columns, end)
        contexts = [start - skipped for start, skipped in zip(starts, self.padding, strict=True)]
        rows = [(slot, n, context) for slot, context in enumerate(contexts)]
        return Step(columns, positions, attend, end, uniform, self._linear(rows))

    def _linear(self, rows: list[tuple[int, int, int]]) -> kernels.Step:
        """Rows of (slot, tokens, context length), one behind the other."""
        slots, lengths, contexts = zip(*rows, strict=True)
        starts = list(accumulate(lengths, initial=0))
        values = torch.tensor([*starts, *slots, *contexts], dtype=torch.int32)
        sizes = [len(starts), len(rows), len(rows)]
        query_start_loc, slot, context_len = values.to(self.positions.device).split(sizes)
        return kernels.Step(query_start_loc, slot, context_len, starts[-1], max(lengths))

    def _attend(self, columns: Tensor, end: int) -> Tensor:
        every = torch.arange(end, device=columns.device)
        attend = every <= columns[..., None]  # [B, n, end]
        if any(self.padding):
            first = torch.tensor(self.padding, device=columns.device)[:, None, None]
            itself = every == columns[..., None]  # padding reads itself: no softmax is empty
            attend = attend & (every >= first) | itself
        attend = attend[:, None]
        if self.additive is None:
            return attend
        least = torch.finfo(self.additive).min
        return torch.zeros_like(attend, dtype=self.additive).masked_fill(~attend, least)
