"""CPU versions of the two kernels by which vLLM's prefix cache copies state pages under drafts.

vLLM keeps the state of a cached prefix by copying a request's page when the request crosses a
block boundary ("align" mode). The GPU kernels shift what they copy by the number of accepted
tokens. These copy a page as it is, because a verbatim copy of our page is always correct.
`provide` registers them.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform

from qwen3next_plugin.engines.patching import Function, Replacement
from qwen3next_plugin.engines.vllm.patches import When, apply, patch


def needed() -> bool:
    """Whether ours replace vLLM's: on every CPU, even if Triton could run vLLM's there."""
    return current_platform.is_cpu()


def provide() -> None:
    """Register our page copies."""
    apply(When.PAGE_COPIES, put=_register_kernels)


def _register_kernels(kernels: Sequence[Function]) -> None:
    """In vLLM's registry of kernels, which replaces them for all importers."""
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({entry.target: entry.function for entry in kernels})


class Addresses(NamedTuple):
    """Where the pages of all layers are: ten arguments that both kernels take in this order."""

    block_table_ptrs: torch.Tensor  # address of each cache group's int32 block table
    block_table_stride: int  # its entries per request
    base_addrs: torch.Tensor  # of each layer's pages
    block_strides: torch.Tensor  # bytes from page to page
    elem_sizes: torch.Tensor
    page_bytes: torch.Tensor  # elements of a page; ours are bytes
    conv_widths: torch.Tensor
    group_indices: torch.Tensor  # the cache group of each layer
    dim_row_count: torch.Tensor
    dim_row_stride: torch.Tensor

    def copy(self, row: int, src_col: int, dst_col: int) -> None:
        """Copy a request's page of every layer from one block-table column to another."""
        layers = zip(
            self.base_addrs.tolist(),
            self.block_strides.tolist(),
            self.page_bytes.tolist(),
            self.group_indices.tolist(),
            strict=True,
        )
        for base, stride, nbytes, group in layers:
            table = int(self.block_table_ptrs[group]) + 4 * row * self.block_table_stride
            src, dst = (
                ctypes.c_int32.from_address(table + 4 * col).value for col in (src_col, dst_col)
            )
            ctypes.memmove(base + dst * stride, base + src * stride, nbytes)


def _rows(count: int, *columns: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """The first `count` values, read at once, because each separate read takes a microsecond."""
    return zip(*(column[:count].tolist() for column in columns), strict=True)


@patch(
    When.PAGE_COPIES,
    "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel",
    kind=Replacement,
    reason="prefix caching with drafts copies pages by this Triton kernel, which has no CPU "
    "version: the engine would end at its first request",
    remove_when="vLLM ships a CPU version",
)
def precopy(
    state_col: torch.Tensor,
    src_col: torch.Tensor,
    token_bias: torch.Tensor,
    *rest: Any,
    **constants: Any,
) -> None:
    """Before a step: copy the page of each request that enters a new block into that block."""
    *addresses, _, num_reqs = rest
    for row, (src, dst) in enumerate(_rows(num_reqs, src_col, state_col)):
        if src >= 0 and src != dst:
            Addresses(*addresses).copy(row, src, dst)


@patch(
    When.PAGE_COPIES,
    "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel",
    kind=Replacement,
    reason="prefix caching with drafts copies pages by this Triton kernel, too",
    remove_when="vLLM ships a CPU version",
)
def postprocess(
    num_accepted: torch.Tensor,
    state_col: torch.Tensor,
    num_scheduled: torch.Tensor,
    num_computed: torch.Tensor,
    num_draft: torch.Tensor,
    *rest: Any,
    block_size: int,
    **constants: Any,
) -> None:
    """After a step: copy the page of each request that filled a block into that block."""
    *addresses, num_accepted_out, _, num_reqs = rest
    rows = _rows(num_reqs, state_col, num_computed, num_scheduled, num_draft, num_accepted)
    for row, (src, computed, scheduled, draft, accepted) in enumerate(rows):
        running = computed + scheduled - draft
        aligned = (running + accepted - 1) // block_size * block_size
        if aligned < running:
            continue
        dst = aligned // block_size - 1
        if src == dst:
            num_accepted_out[row] = 1
        else:
            Addresses(*addresses).copy(row, src, dst)
