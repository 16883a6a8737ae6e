"""An int8 copy of the output head, of which a draft asks the likelier rows.

A draft needs one token, not a distribution, and what it gets wrong the full head puts right at
verification.
"""

from typing import Protocol

import torch
from torch import nn

from qwen3next_plugin.kernels.draft_head import draft_head, quantise_rows
from qwen3next_plugin.mtp.costs import DRAFTED
from qwen3next_plugin.mtp.vocabulary import DraftVocabulary


class Ranks(Protocol):
    """The ranks that share a head, as both engines' group coordinators are."""

    world_size: int

    def all_gather(self, input_: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate each rank's tensor along `dim`."""


class DraftHead(nn.Module):
    """A rank's share of the head that drafts choose from."""

    def __init__(
        self, weight: torch.Tensor, *, first: int, end: int, vocab_size: int, ranks: Ranks
    ) -> None:
        """Shapes: weight [>= end - first, D], the rows of tokens `first` to `end`, then padding."""
        super().__init__()
        self.first, self.end, self.ranks = first, end, ranks
        self.weight, self.scale = quantise_rows(weight[: end - first])
        self.vocabulary = DraftVocabulary(vocab_size, DRAFTED)
        self.rows = self._rows()

    def _rows(self) -> torch.Tensor:
        """The drafted tokens that this rank holds, as rows of its weight [R] int32."""
        ids = self.vocabulary.ids
        return ids[(ids >= self.first) & (ids < self.end)] - self.first

    def see(self, token_ids: torch.Tensor) -> None:
        """Let drafts follow what is asked and answered. Shapes: token_ids [T]."""
        if self.vocabulary.see(token_ids):
            self.rows = self._rows()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each. Shapes: hidden_states [N, D], returns [N]."""
        if len(self.rows):
            rows, values = draft_head(
                x=hidden_states, weight=self.weight, scale=self.scale, rows=self.rows
            )
            tokens = rows + self.first
        else:  # a rank all of whose rows are unlikely tokens
            values = hidden_states.new_full((len(hidden_states),), -torch.inf, dtype=torch.float32)
            tokens = torch.zeros(len(hidden_states), dtype=torch.int64)
        if self.ranks.world_size == 1:
            return tokens
        # fp32, in which ids to 2^24 are exact: vLLM's gather in shared memory knows no fp64
        pairs = torch.stack([values.float(), tokens.float()], dim=-1)[:, None]
        pairs = self.ranks.all_gather(pairs, dim=1)  # [N, ranks, 2]
        best = pairs[..., 0].argmax(dim=1, keepdim=True)
        return pairs[..., 1].gather(1, best).squeeze(1).long()
