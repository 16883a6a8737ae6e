"""Copies of whole state pages: all layers of a request at once."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.checks import INT, INT64, check, sizes

WORD = 8  # bytes


def copy_pages(*, pages_: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> None:
    """pages_[:, target[i]] = pages_[:, source[i]] where mask[i].

    Skips entries whose source or target is not a slot. The caller must not use a target twice, nor
    as a source.

    Shapes:
        pages_: [layers, slots, bytes] uint8, a page contiguous and a multiple of 8 bytes
        source: [N] int32, target: [N] int64, slots; mask: [N] bool

    Raises: ValueError: an argument's shape, stride, device or dtype.
    """
    op, device = "copy_pages", pages_.device
    run = dispatch.implementation(op, device)
    layers, slots, size = sizes(op, "pages_", pages_, 3)
    (N,) = sizes(op, "source", source, 1)
    check(op, "pages_", pages_, (layers, slots, size // WORD * WORD), (torch.uint8,), device)
    check(op, "source", source, (N,), INT, device)
    check(op, "target", target, (N,), INT64, device)
    check(op, "mask", mask, (N,), (torch.bool,), device)
    run(pages_, source, target, mask)
