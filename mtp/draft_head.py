"""Draft head: an int8 copy of the output head that computes only the likelier tokens.

A draft needs the likeliest token and no distribution. Verification uses the full head, so an error
here costs acceptance and never changes the output.
"""

from typing import Protocol

import torch
from torch import nn

from qwen3next_plugin.kernels.draft_head import draft_head, quantise_rows
from qwen3next_plugin.mtp.vocabulary import DraftVocabulary

DRAFTED = 32768  # most tokens that a draft chooses from: docs/kernels.md says what they cover


class Ranks(Protocol):
    """The tensor-parallel ranks that share a head; both engines' group coordinators fit."""

    world_size: int

    def all_gather(self, input_: torch.Tensor, dim: int) -> torch.Tensor:
        """Concatenate each rank's tensor along `dim`."""


class DraftHead(nn.Module):
    """One rank's share of the head that drafts are chosen by."""

    def __init__(
        self, weight: torch.Tensor, *, first: int, end: int, vocab_size: int, ranks: Ranks
    ) -> None:
        """Shapes: weight [>= end - first, D] of tokens `first` to `end`, then padding."""
        super().__init__()
        self.first, self.end, self.ranks = first, end, ranks
        self.weight, self.scale = quantise_rows(weight[: end - first])
        self.vocabulary = DraftVocabulary(vocab_size, DRAFTED)
        self.token_ids = self._local_ids()

    def _local_ids(self) -> torch.Tensor:
        """The drafted tokens of this rank, counted from its first token [R] int32."""
        ids = self.vocabulary.ids
        return ids[(ids >= self.first) & (ids < self.end)] - self.first

    def see(self, token_ids: torch.Tensor) -> None:
        """Let the draft vocabulary follow these tokens. Shapes: token_ids [T]."""
        if self.vocabulary.see(token_ids):
            self.token_ids = self._local_ids()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest token for each. Shapes: hidden_states [N, D], returns [N]."""
        if len(self.token_ids):
            local_ids, values = draft_head(
                x=hidden_states,
                weight=self.weight,
                scale=self.scale,
                token_ids=self.token_ids,
            )
            tokens = local_ids + self.first
        else:  # this rank holds no drafted token
            values = hidden_states.new_full((len(hidden_states),), -torch.inf, dtype=torch.float32)
            tokens = torch.zeros(len(hidden_states), dtype=torch.int64)
        if self.ranks.world_size == 1:
            return tokens
        # Ids below 2^24 are exact in fp32; vLLM's gather in shared memory does not support fp64.
        pairs = torch.stack([values.float(), tokens.float()], dim=-1)[:, None]
        pairs = self.ranks.all_gather(pairs, dim=1)  # [N, ranks, 2]
        best = pairs[..., 0].argmax(dim=1, keepdim=True)
        return pairs[..., 1].gather(1, best).squeeze(1).long()
