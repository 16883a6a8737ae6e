"""The step that has just ended, as the MTP layer reads it."""

from dataclasses import dataclass

import torch

from qwen3next_plugin.mtp.pending import PendingTokens, Row


@dataclass(slots=True, kw_only=True)
class FinishedStep:
    """The N rows of a step of T tokens; lists have an element for each row.

    Shapes: token_ids [T], the token after each of the step's; hidden_states [T, D]
    """

    requests: list[str]
    starts: list[int]  # among the tokens
    firsts: list[int]  # position of the first token
    scheduled: list[int]  # tokens, rejected drafts included
    counts: list[int]  # tokens without them
    prefilling: list[bool]  # more of its prompt follows
    continues: list[bool]  # it decoded or verified; else the step read its prompt
    token_ids: torch.Tensor
    hidden_states: torch.Tensor

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def ends(self) -> list[int]:
        """The position after each row's last token."""
        return [first + count for first, count in zip(self.firsts, self.counts, strict=True)]

    def row(self, i: int) -> Row:
        """Row i, with its committed tokens."""
        tokens = slice(self.starts[i], self.starts[i] + self.counts[i])
        return Row(
            request=self.requests[i],
            index=i,
            tokens=PendingTokens(
                self.firsts[i], self.token_ids[tokens], self.hidden_states[tokens]
            ),
            scheduled=self.scheduled[i],
            prefilling=self.prefilling[i],
            continues=self.continues[i],
        )
