"""Page copies of vLLM's prefix caching ("align" mode) under speculation, on the CPU.

vLLM keeps the state of a cached prefix by copying a request's page as the request crosses a block
boundary. With speculation the copies are two Triton kernels that have no CPU version in 0.32 and
0.33: the engine dies at the first request. These are the two. They drop what the GPU kernels do
with accepted counts, since a verbatim copy of our page is always a correct copy.

Installed through vLLM's own `register_kernels`. Can go when vLLM ships CPU versions of both.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from vllm.platforms import current_platform

KERNELS = "vllm.v1.worker.mamba_utils."


def needed() -> bool:
    """Whether the host has neither kernel, because it has no Triton."""
    from vllm.triton_utils import HAS_TRITON

    return current_platform.is_cpu() and not HAS_TRITON


def install() -> None:
    """Register both kernels where the host has none; idempotent."""
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
    from vllm.v1.worker import mamba_utils

    if not needed():
        return
    if isinstance(mamba_utils.precopy_mamba_align_fused_kernel, KernelOverride):
        return
    register_kernels(
        {
            KERNELS + "precopy_mamba_align_fused_kernel": _precopy,
            KERNELS + "postprocess_mamba_fused_kernel": _postprocess,
        }
    )


class Layout(NamedTuple):
    """Where the pages of all layers lie: ten arguments that both kernels take in this order."""

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


def _precopy(
    state_col: torch.Tensor,
    src_col: torch.Tensor,
    token_bias: torch.Tensor,
    *rest: Any,
    **constants: Any,
) -> None:
    """Before a step: a request that moves into a new block takes its page along."""
    *layout, _, num_reqs = rest
    for row in range(num_reqs):
        src, dst = int(src_col[row]), int(state_col[row])
        if src >= 0 and src != dst:
            Layout(*layout).copy(row, src, dst)


def _postprocess(
    num_accepted: torch.Tensor,
    state_col: torch.Tensor,
    num_scheduled: torch.Tensor,
    num_computed: torch.Tensor,
    num_draft: torch.Tensor,
    *rest: Any,
    block_size: int,
    **constants: Any,
) -> None:
    """After a step: a request whose accepted tokens filled a block leaves its page there."""
    *layout, num_accepted_out, _, num_reqs = rest
    for row in range(num_reqs):
        running = int(num_computed[row] + num_scheduled[row] - num_draft[row])
        aligned = (running + int(num_accepted[row]) - 1) // block_size * block_size
        if aligned < running:
            continue
        src, dst = int(state_col[row]), aligned // block_size - 1
        if src == dst:
            num_accepted_out[row] = 1
        else:
            Layout(*layout).copy(row, src, dst)
