"""The columns, positions, masks and rows of a step, as the host's layers and ours take them."""

from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from qwen3next_plugin.kernels import step as kernels


@dataclass(frozen=True, slots=True)
class BatchStep:
    """n tokens of each row, starting at the row's own column.

    A row's tokens have columns from 0, padding included. `end` follows the last column of all rows.
    Shapes: columns, positions [B, n]; attend [B, 1, n, end], or None: everything before; is_token
        [B, n], or None: all are; so_far [B, end], the positions of all columns, for an indexer
    """

    columns: Tensor
    positions: Tensor
    attend: Tensor | None
    end: int
    uniform: bool  # all rows have the same columns
    linear: kernels.Step  # as linear layers take it
    is_token: Tensor | None = None
    so_far: Tensor | None = None

    def linear_on(self, device: torch.device) -> kernels.Step:
        """`linear` on a layer's device, because `device_map` may spread layers."""
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
        self,
        positions: Tensor,
        padding: list[int],
        *,
        additive: torch.dtype | None,
        indexed: bool = False,
    ) -> None:
        """`padding` is each prompt's number of columns before its first token.

        `additive`: the dtype of masks that are added to scores; None: they are booleans.
        `indexed`: attention has an indexer, which always needs a mask and all positions.

        Shapes: positions [B, T] of the prompts
        """
        self.positions, self.padding = positions, padding
        self.additive, self.indexed = additive, indexed

    def prompt(self) -> BatchStep:
        """The prompts themselves."""
        B, T = self.positions.shape
        columns = torch.arange(T, device=self.positions.device).expand(B, T)
        padded = any(self.padding)
        causal = not (padded or self.additive or self.indexed)  # sdpa's own flag says it
        attend = None if causal else self._attend(columns, T)
        is_token = columns >= self._first_columns() if padded else None
        rows = []
        for slot, padding in enumerate(self.padding):
            rows += [(kernels.NULL_SLOT, padding, 0), (slot, T - padding, 0)]
        return BatchStep(
            columns,
            self.positions,
            attend,
            T,
            uniform=True,
            linear=self._linear(rows),
            is_token=is_token,
            so_far=self._so_far(T),
        )

    def build(self, starts: list[int], n: int) -> BatchStep:
        """A step of n tokens from column starts[b] of row b on, after its prompt's first token."""
        T, device = self.positions.shape[1], self.positions.device
        uniform, end = min(starts) == max(starts), max(starts) + n
        first = torch.tensor(starts, device=device)[:, None]
        columns = first + torch.arange(n, device=device)  # [B, n]
        positions = columns + self.positions[:, -1:] - (T - 1)
        plain = uniform and n == 1 and not any(self.padding) and not self.indexed
        attend = None if plain else self._attend(columns, end)
        contexts = [start - skipped for start, skipped in zip(starts, self.padding, strict=True)]
        rows = [(slot, n, context) for slot, context in enumerate(contexts)]
        linear, so_far = self._linear(rows), self._so_far(end)
        return BatchStep(columns, positions, attend, end, uniform, linear, so_far=so_far)

    def _so_far(self, end: int) -> Tensor | None:
        if not self.indexed:
            return None
        T, last = self.positions.shape[1], self.positions[:, -1:]
        behind = torch.arange(1, end - T + 1, device=last.device)
        return torch.cat([self.positions, last + behind], dim=1)

    def _first_columns(self) -> Tensor:
        """Shapes: returns [B, 1]"""
        return torch.tensor(self.padding, device=self.positions.device)[:, None]

    def _linear(self, rows: list[tuple[int, int, int]]) -> kernels.Step:
        """The step of these rows: (slot, tokens, context length), in order."""
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
            first = self._first_columns()[..., None]  # [B, 1, 1]
            itself = every == columns[..., None]  # padding reads itself, so no softmax is empty
            attend = attend & (every >= first) | itself
        attend = attend[:, None]
        if self.additive is None:
            return attend
        least = torch.finfo(self.additive).min
        return torch.zeros_like(attend, dtype=self.additive).masked_fill(~attend, least)
