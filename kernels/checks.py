"""Checks of an op's arguments: shape, dtype, device and strides.

A call is checked once, in its public op. Checking the many arguments of an op on state pages in
Python would cost every layer time: native/arguments.h does it in C++, and the op's arguments.py for
the other backends.
"""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.step import Step

ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)
FLOAT = (torch.float32,)
INT = (torch.int32,)
INT64 = (torch.int64,)
INDEX = (*INT, *INT64)


def check(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtypes, device) -> None:
    """Raise unless x has the shape, one of the dtypes, the device, and unit stride at the end.

    Raises: ValueError naming op and argument.
    """
    if x.dtype in dtypes and x.shape == shape and x.device == device and x.stride(-1) == 1:
        return
    if x.dtype not in dtypes:
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, not {allowed}")
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, not {tuple(shape)}")
    if x.device != device:
        raise ValueError(f"{op}: {name} is on {x.device}, not on {device}")
    if x.shape[-1] > 1:
        raise ValueError(f"{op}: the last dim of {name} is not contiguous: {x.stride()}")


def sizes(op: str, name: str, x: Tensor, dims: int) -> torch.Size:
    """The shape of x. Raises: ValueError naming op and argument unless it has so many dims."""
    if x.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, not {dims} dims")
    return x.shape


def check_contiguous(op: str, name: str, x: Tensor) -> None:
    """Raise ValueError unless x is contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"{op}: {name} is not contiguous: strides {x.stride()}")


def check_page(
    op: str, name: str, x: Tensor, shape: tuple[int, ...], dtypes, device, slots: int | None = None
) -> None:
    """`check`, and raise unless each slot is contiguous. slots: how many; None: any number."""
    count = x.shape[:1] if slots is None else (slots,)
    check(op, name, x, (*count, *shape), dtypes, device)
    strides = x.stride()
    expected = 1
    for i in range(len(shape) - 1, -1, -1):
        if strides[i + 1] != expected and shape[i] > 1:
            raise ValueError(f"{op}: a slot of {name} is not contiguous: strides {strides}")
        expected *= shape[i]


def check_step(op: str, step: Step, device: torch.device) -> None:
    """Raise unless the step's tensors are contiguous int32 of N + 1, N and N entries."""
    N = step.slot.numel()
    check(op, "query_start_loc", step.query_start_loc, (N + 1,), INT, device)
    check(op, "slot", step.slot, (N,), INT, device)
    check(op, "context_len", step.context_len, (N,), INT, device)


def check_sequences(
    op: str,
    token_table: Tensor,
    table_row: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    device: torch.device,
) -> None:
    """Raise ValueError unless these fit the sequences of `paged_attention`."""
    R, M = sizes(op, "token_table", token_table, 2)
    N = table_row.numel()
    check(op, "token_table", token_table, (R, M), INT, device)
    check(op, "table_row", table_row, (N,), INDEX, device)
    check(op, "query_start_loc", query_start_loc, (N + 1,), INT, device)
    check(op, "seq_lens", seq_lens, (N,), INDEX, device)
