"""The checks of the op's arguments; cpu.cpp checks the same."""

from torch import Tensor

from qwen3next_plugin.kernels.checks import INDEX, INT, INT64, check, check_page, check_step, sizes
from qwen3next_plugin.kernels.ngram_embedding.hashing import NgramHash
from qwen3next_plugin.kernels.ngram_embedding.table import NgramTable
from qwen3next_plugin.kernels.step import Step


def check_arguments(
    token_ids: Tensor,
    table: NgramTable,
    hashing: NgramHash,
    tokens_: Tensor,
    span: Tensor,
    step: Step,
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op, device = "ngram_embedding", token_ids.device
    n, heads = hashing.multipliers.numel(), hashing.sizes.numel()
    slots, ring = sizes(op, "tokens_", tokens_, 2)
    if n < 2 or not heads or heads % (n - 1):
        raise ValueError(f"{op}: {heads} heads for n-grams of 2 to {n} tokens")
    if ring < n:
        raise ValueError(f"{op}: tokens_ holds {ring} tokens, fewer than an n-gram of {n}")
    check(op, "token_ids", token_ids, (token_ids.numel(),), INDEX, device)
    check(op, "multipliers", hashing.multipliers, (n,), INT64, device)
    check(op, "sizes", hashing.sizes, (heads,), INT64, device)
    check(op, "offsets", hashing.offsets, (heads,), INT64, device)
    check_page(op, "tokens_", tokens_, (ring,), INT, device)
    check_page(op, "span", span, (2,), INT, device, slots)
    check_step(op, step, device)
