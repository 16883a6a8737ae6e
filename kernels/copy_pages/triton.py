"""Page copies in Triton. Few programs per entry, because most entries copy nothing."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwen3next_plugin.kernels.gpu.configs import config_for

PROGRAMS = 64  # of one entry
WORDS = 1024  # 8-byte words that a program copies at a time


def run(pages_: Tensor, source: Tensor, target: Tensor, mask: Tensor) -> None:
    """Shapes as in the public op."""
    if not (len(source) and pages_.numel()):
        return
    words = pages_.view(torch.int64)
    layers, slots, size = words.shape
    _copy_pages[len(source), PROGRAMS](
        words, *words.stride()[:2], source, target, mask, layers, slots, size,
        BLOCK=WORDS, STRIDE=PROGRAMS, **config_for(pages_.device).rowwise.options(),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["layer_stride", "slot_stride", "layers", "slots", "size"],
    do_not_specialize_on_alignment=["source", "target", "mask"],
)
def _copy_pages(
    pages, layer_stride, slot_stride, source, target, mask, layers, slots, size,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """A share of entry i's page in every layer; grid (N, STRIDE)."""
    i = tl.program_id(0)
    from_, to = tl.load(source + i).to(tl.int64), tl.load(target + i).to(tl.int64)
    known = (from_ >= 0) & (from_ < slots) & (to >= 0) & (to < slots)
    if (tl.load(mask + i) == 0) | (known == 0):
        return
    blocks = (size + BLOCK - 1) // BLOCK
    for j in range(tl.program_id(1), layers * blocks, STRIDE):
        layer = (j // blocks).to(tl.int64)
        at = (j - j // blocks * blocks) * BLOCK + tl.arange(0, BLOCK)
        page = pages + layer * layer_stride + at
        word = tl.load(page + from_ * slot_stride, mask=at < size, other=0)
        tl.store(page + to * slot_stride, word, mask=at < size)
