"""Registers a function as the operator `torch.ops.sgl_kernel.<name>`."""

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = "sgl_kernel"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(*mutates: str) -> Callable[[Callable], Callable]:
    """Register a function for CPU tensors; `mutates` names the arguments that it writes.

    An operator that returns nothing is traced by its schema alone. It must not have a fake of its
    own: SGLang registers fakes for some of these names, and torch refuses a second one.
    """

    def register(run: Callable) -> Callable:
        name = run.__name__
        LIBRARY.define(name + torch.library.infer_schema(run, mutates_args=mutates))
        LIBRARY.impl(name, run, "CPU")
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        op.__doc__ = run.__doc__
        return op

    return register


def ragged(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every element of rows of these lengths, laid end to end."""
    ends = lengths.cumsum(0)
    element = torch.arange(int(ends[-1]) if len(ends) else 0, device=lengths.device)
    row = torch.searchsorted(ends, element, right=True)  # repeat_interleave would start all threads
    column = element - (ends - lengths)[row]
    return row, column
