"""Consecutive steps without drafts of the same requests."""

from dataclasses import dataclass, field

import torch
from sglang.srt.managers.schedule_batch import Req


@dataclass(slots=True)
class PlainSteps:
    """Steps that the drafter has not looked at yet. In each, each request got one token.

    Shapes: first [N], positions of the first step's tokens; token_ids [N] and hidden_states [N, D]
    of each step
    """

    reqs: list[Req]
    first: torch.Tensor
    token_ids: list[torch.Tensor] = field(default_factory=list)
    hidden_states: list[torch.Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of steps that were timed

    def __len__(self) -> int:
        return len(self.token_ids)

    def clear(self) -> None:
        """Go on behind the last step."""
        self.first = self.first + len(self)
        for values in (self.token_ids, self.hidden_states, self.seconds):
            values.clear()
