"""Builds a `Step` from an engine's metadata: checked on a CPU, without waiting on a GPU."""

import numpy as np
import torch

from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.step import NULL_SLOT, Step


class StepError(ValueError):
    """A step with an index out of range; `row` is the row with the error, if it is in a row."""

    def __init__(self, what: str, row: int | None = None) -> None:
        super().__init__(what)
        self.row = row


def build_step(
    *,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    slot: torch.Tensor,
    num_tokens: int,
    num_slots: int,
    max_query_len: int,
) -> Step:
    """Build a step from an engine's metadata; on a CPU, check every index.

    On a GPU that would wait for the device in every step, so the kernels check there.

    Shapes:
        query_start_loc [N+1], seq_lens [N] (committed + this step's tokens), slot [N]

    Raises:
        StepError: naming the first row whose slot or lengths are out of range.
    """
    query_len = query_start_loc[1:] - query_start_loc[:-1]
    step = Step(
        query_start_loc=query_start_loc.to(torch.int32),
        slot=slot.to(torch.int32),
        context_len=(seq_lens - query_len).to(torch.int32),
        num_tokens=num_tokens,
        max_query_len=max_query_len,
    )
    if slot.device.type == "cpu":
        _check(step, query_len, num_slots)
    return step


def _check(step: Step, query_len: torch.Tensor, num_slots: int) -> None:
    """Check all rows at once; find the wrong one only if a check fails."""
    length, context, slot = (x.numpy() for x in (query_len, step.context_len, step.slot))
    active = slot != NULL_SLOT
    out_of_range = active & ((slot < 0) | (slot >= num_slots))
    too_long = length > step.max_query_len
    if ((length < 0) | too_long | out_of_range | (active & (context < 0))).any():
        _refuse(length < 0, "a negative query length", length)
        _refuse(too_long, f"more than {step.max_query_len} tokens", length)
        _refuse(active & (context < 0), "a negative context length", context)
        _refuse(out_of_range, f"a slot outside [0, {num_slots})", slot)
    starts = step.query_start_loc.numpy()
    first, last = starts[0], starts[-1]
    if first != 0 or last > step.num_tokens:
        raise StepError(f"rows span tokens {first} to {last} of a step of {step.num_tokens}")


def _refuse(bad: np.ndarray, what: str, values: np.ndarray) -> None:
    """Raise StepError about the first row that is bad, if one is."""
    if bad.any():
        row = int(bad.argmax())
        raise StepError(f"row {row} has {what}: {values[row]}", row)


class DeviceSteps:
    """Builds steps on a GPU without waiting for it, in tensors whose address a CUDA graph may keep.

    No host gives slot 0 to a request: rows on it, and rows without tokens, are padding.
    """

    def __init__(self, max_rows: int, device: torch.device) -> None:
        self.slot = torch.full((max_rows,), NULL_SLOT, dtype=torch.int32, device=device)
        self.context_len = torch.zeros_like(self.slot)
        self.query_start_loc = torch.zeros(max_rows + 1, dtype=torch.int32, device=device)
        self.watch = faults.Watch(device) if device.type == "cuda" else None

    def build(
        self,
        *,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        slot: torch.Tensor,
        num_tokens: int,
        max_query_len: int,
    ) -> Step:
        """Build the next step. It overwrites the previous one, which must have been launched.

        Shapes:
            query_start_loc [N+1], seq_lens [N] (committed + this step's tokens), slot [N]

        Raises: RuntimeError: the page of a row could not serve an earlier step.
        """
        if self.watch is not None:
            self.watch.look()
        N = len(slot)
        query_start_loc = self.query_start_loc[: N + 1].copy_(query_start_loc)
        query_len = query_start_loc.diff()
        is_padding = (query_len == 0) | (slot == 0)
        return Step(
            query_start_loc=query_start_loc,
            slot=self.slot[:N].copy_(slot.masked_fill(is_padding, NULL_SLOT)),
            context_len=self.context_len[:N].copy_(seq_lens - query_len),
            num_tokens=num_tokens,
            max_query_len=max_query_len,
        )
