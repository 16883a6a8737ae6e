"""The columns, positions and masks of a step, as the host's layers take them."""

from dataclasses import dataclass

import torch
from torch import Tensor


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


class Steps:
    """Builds the steps of a batch."""

    def __init__(
        self, positions: Tensor, attention_mask: Tensor | None, *, additive: torch.dtype | None
    ) -> None:
        """`additive`: the dtype of masks that are added to scores; None: they are booleans.

        Shapes: positions, attention_mask [B, T] of the prompts
        """
        self.positions, self.padding = positions, attention_mask
        self.additive = additive

    def prompt(self) -> Step:
        """The prompts themselves."""
        B, T = self.positions.shape
        columns = torch.arange(T, device=self.positions.device).expand(B, T)
        causal = self.padding is None and self.additive is None  # sdpa's own flag says it
        attend = None if causal else self._attend(columns, T)
        return Step(columns, self.positions, attend, T, uniform=True)

    def build(self, starts: list[int], n: int) -> Step:
        """n tokens from column starts[b] of row b on, behind its prompt's first token."""
        T, device = self.positions.shape[1], self.positions.device
        uniform, end = min(starts) == max(starts), max(starts) + n
        first = torch.tensor(starts, device=device)[:, None]
        columns = first + torch.arange(n, device=device)  # [B, n]
        positions = columns + self.positions[:, -1:] - (T - 1)
        plain = uniform and n == 1 and self.padding is None
        return Step(columns, positions, None if plain else self._attend(columns, end), end, uniform)

    def _attend(self, columns: Tensor, end: int) -> Tensor:
        before = torch.arange(end, device=columns.device) <= columns[..., None]  # [B, n, end]
        if self.padding is not None:
            T = min(end, self.padding.shape[1])
            real = before.new_ones(len(columns), 1, end)
            real[:, 0, :T] = self.padding[:, :T].bool()
            itself = torch.arange(end, device=columns.device) == columns[..., None]
            before = before & (real | itself)  # padding reads itself, so that no softmax is empty
        attend = before[:, None]
        if self.additive is None:
            return attend
        least = torch.finfo(self.additive).min
        return torch.zeros_like(attend, dtype=self.additive).masked_fill(~attend, least)
