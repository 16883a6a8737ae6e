"""Errors found by a GPU kernel: a record on the device, which the host reads later.

A kernel cannot raise, and waiting for it would stall the engine. So a bad row's output is NaN, its
page stays as it was, and the first fault since the last check is recorded on the device. `check`
raises the same error as the native kernels.
"""

import torch
from torch import Tensor

TOKENS, SLOT, CONTEXT, SHARED, POSITION = 1, 2, 3, 4, 5  # kinds of fault
_RECORDS: dict[torch.device, Tensor] = {}


def record(device: torch.device) -> Tensor:
    """The device's record [10] int64, zero while there is no fault; one per process."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _RECORDS:
        with torch.inference_mode(False):  # else `check` may not clear it
            _RECORDS[device] = torch.zeros(10, dtype=torch.int64, device=device)
    return _RECORDS[device]


def check(device: torch.device) -> None:
    """Raise the first fault since the last check, and clear it. Waits for the device.

    Raises: RuntimeError naming the row.
    """
    kept = record(device)
    message = message_of(kept.tolist())
    if message:
        kept.zero_()
        raise RuntimeError(message)


def checked(out: Tensor) -> Tensor:
    """Return `out`, on a CPU after `check`: there the interpreter has already run the kernels."""
    if out.device.type == "cpu":
        check(out.device)
    return out


class Watch:
    """Reads a device's record without waiting: one call starts a copy, the next raises from it."""

    def __init__(self, device: torch.device) -> None:
        self.record = record(device)
        self.seen = torch.zeros_like(self.record, device="cpu", pin_memory=True)
        self.arrived = torch.cuda.Event()

    def look(self) -> None:
        """Raise the fault that an earlier call copied, and start the next copy; once a step.

        Raises: RuntimeError naming the row of an earlier step.
        """
        if torch.cuda.is_current_stream_capturing() or not self.arrived.query():
            return
        if message := message_of(self.seen.tolist()):
            raise RuntimeError(message)
        self.seen.copy_(self.record, non_blocking=True)
        self.arrived.record()


def message_of(values: list[int]) -> str | None:
    """The error message of a record's values, or None."""
    kind, row, page, begin, n, c, start, end, slots, T = values
    if kind == TOKENS:
        return f"row {row}: query_start_loc {begin} to {begin + n} is not a range of {T} tokens"
    if kind == SLOT:
        return f"row {row}: slot {page} is not one of {slots} slots"
    if kind == CONTEXT:
        return (
            f"row {row}: slot {page} holds start={start} end={end}"
            f" and cannot continue at context length c={c}"
        )
    if kind == SHARED:
        return f"row {row}: slot {page} is used by an earlier row"
    if kind == POSITION:
        return f"token {row}: position {page} is not one of {slots} in cos_sin"
    return None
