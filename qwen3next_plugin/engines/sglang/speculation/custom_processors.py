"""Custom logit processors under drafts: a row's processor sees the drafts before the row.

A processor may read its request, as SGLang's thinking budgets do. SGLang's own call with several
rows a request passes every row the request as it was before the step.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch

REQUEST = "__req__"  # SGLang's key for it in a processor's parameters


class RequestAt:
    """A request as it is once some drafts are part of its answer."""

    def __init__(self, request: Any, drafts: Sequence[int]) -> None:
        self._request = request
        self.output_ids = copy(request.output_ids)
        self.output_ids.extend(drafts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


def apply_custom_processors(
    logits: torch.Tensor, info: Any, request: torch.Tensor, drafts: Sequence[tuple[int, ...]]
) -> None:
    """Change rows of logits in place, each as its plain step would.

    Shapes: logits [T, V]; request [T], each row's index in the batch; drafts [T], those before it
    """
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    indices = request.tolist()
    rows = copy(info)
    rows.temperatures = info.temperatures[request]  # SGLang takes the number of rows from it
    rows.custom_params = [
        _at(info.custom_params[i], before) for i, before in zip(indices, drafts, strict=True)
    ]
    rows.custom_logit_processor = {
        key: _of_rows(entry, indices) for key, entry in info.custom_logit_processor.items()
    }
    apply_custom_logit_processor(logits, rows)


def _at(params: dict[str, Any] | None, drafts: tuple[int, ...]) -> dict[str, Any] | None:
    if not drafts or not params or REQUEST not in params:
        return params
    return params | {REQUEST: RequestAt(params[REQUEST], drafts)}


def _of_rows(entry: Any, indices: list[int]) -> Any:
    """A processor's entry, extended to all rows of its requests."""
    rows = [row for row, i in enumerate(indices) if i in entry.rows]
    return replace(entry, rows=rows, indices=torch.tensor(rows))
