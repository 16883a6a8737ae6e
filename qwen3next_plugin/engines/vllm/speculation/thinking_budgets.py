"""vLLM's thinking budgets under drafts: applied row by row, as without drafts step by step.

vLLM itself ends a budget at a position that depends on the number of drafts, and in a step without
drafts it applies every request's budget to the first row.
"""

from copy import copy
from typing import Any

import torch

from qwen3next_plugin.engines.vllm.speculation.logit_rows import LogitRows


def without_drafts(holder: Any) -> Any:
    """The holder as it is without drafts, where row i belongs to request i; shares the states."""
    plain = copy(holder)
    plain.in_spec_mode = False
    plain.cu_num_tokens = {}
    return plain


class ThinkingBudgets:
    """Replaces the holder while rows are sampled."""

    def __init__(self, holder: Any, rows: LogitRows) -> None:
        self.holder, self.rows = holder, rows
        self.of_row = without_drafts(holder)

    def has_tracked_requests(self) -> bool:
        return self.holder.has_tracked_requests()

    def update_state(self, outputs: list[list[int]], *_: Any, **__: Any) -> None:
        """Derive each row's state from the row before it, one token later."""
        starts, counts = self.rows.starts, self.rows.counts
        states: dict[int, dict[str, Any]] = {}
        of_request = dict(self.holder._state)
        for offset in range(max(counts)):
            left = [i for i in of_request if offset < counts[i]]
            self.of_row._state = {starts[i] + offset: {**of_request[i]} for i in left}
            self.of_row.update_state(outputs, None)
            states |= self.of_row._state
            of_request = {i: states[starts[i] + offset] for i in left}
        self.of_row._state = states

    def apply_to_logits(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.of_row.apply_to_logits(logits, False, None)

    def rewind(self, used: list[int]) -> None:
        """Keep the state after each request's last token."""
        states = self.of_row._state
        for i in self.holder._state:
            self.holder._state[i] = states[self.rows.starts[i] + used[i] - 1]
