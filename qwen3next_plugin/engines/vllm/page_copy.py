"""Page copies of vLLM's prefix caching ("align" mode) under speculation, on the CPU.

vLLM keeps the state of a cached prefix by copying a request's page as the request crosses a block
boundary. With speculation the copies are two Triton kernels that have no CPU version in 0.32 and
0.33: the engine dies at the first request. These are the two. They drop what the GPU kernels do
with accepted counts, since a verbatim copy of our page is always a correct copy.

Installed through vLLM's own `register_kernels`. Can go when vLLM ships CPU versions of both.
"""

import ctypes

import torch
from vllm.platforms import current_platform

KERNELS = "vllm.v1.worker.mamba_utils."


def install() -> None:
    """Register both kernels where the host has none; idempotent."""
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
    from vllm.v1.worker import mamba_utils

    if HAS_TRITON or not current_platform.is_cpu():
        return
    if isinstance(mamba_utils.precopy_mamba_align_fused_kernel, KernelOverride):
        return
    register_kernels(
        {
            KERNELS + "precopy_mamba_align_fused_kernel": _precopy,
            KERNELS + "postprocess_mamba_fused_kernel": _postprocess,
        }
    )


def _precopy(
    mamba_state_idx_ptr: torch.Tensor,
    src_col_ptr: torch.Tensor,
    token_bias_ptr: torch.Tensor,
    block_table_ptrs_ptr: torch.Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: torch.Tensor,
    state_block_strides_ptr: torch.Tensor,
    state_elem_sizes_ptr: torch.Tensor,
    state_inner_sizes_ptr: torch.Tensor,
    state_conv_widths_ptr: torch.Tensor,
    state_group_indices_ptr: torch.Tensor,
    state_dim_row_count_ptr: torch.Tensor,
    state_dim_row_stride_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor | None,
    num_reqs: int,
    **_: object,
) -> None:
    """Before a step: a request that moves into a new block takes its page along."""
    for row in range(num_reqs):
        src, dst = int(src_col_ptr[row]), int(mamba_state_idx_ptr[row])
        if src < 0 or src == dst:
            continue
        _copy_page(
            row,
            src,
            dst,
            block_table_ptrs_ptr,
            block_table_stride_req,
            state_base_addrs_ptr,
            state_block_strides_ptr,
            state_inner_sizes_ptr,
            state_group_indices_ptr,
        )


def _postprocess(
    num_accepted_tokens_ptr: torch.Tensor,
    mamba_state_idx_ptr: torch.Tensor,
    num_scheduled_tokens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    num_draft_tokens_ptr: torch.Tensor,
    block_table_ptrs_ptr: torch.Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: torch.Tensor,
    state_block_strides_ptr: torch.Tensor,
    state_elem_sizes_ptr: torch.Tensor,
    state_inner_sizes_ptr: torch.Tensor,
    state_conv_widths_ptr: torch.Tensor,
    state_group_indices_ptr: torch.Tensor,
    state_dim_row_count_ptr: torch.Tensor,
    state_dim_row_stride_ptr: torch.Tensor,
    num_accepted_tokens_out_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor | None,
    num_reqs: int,
    block_size: int,
    **_: object,
) -> None:
    """After a step: a request whose accepted tokens filled a block leaves its page there."""
    for row in range(num_reqs):
        num_accepted = int(num_accepted_tokens_ptr[row])
        running = int(
            num_computed_tokens_ptr[row] + num_scheduled_tokens_ptr[row] - num_draft_tokens_ptr[row]
        )
        aligned = (running + num_accepted - 1) // block_size * block_size
        if aligned < running:
            continue
        src, dst = int(mamba_state_idx_ptr[row]), aligned // block_size - 1
        if src == dst:
            num_accepted_tokens_out_ptr[row] = 1
            continue
        _copy_page(
            row,
            src,
            dst,
            block_table_ptrs_ptr,
            block_table_stride_req,
            state_base_addrs_ptr,
            state_block_strides_ptr,
            state_inner_sizes_ptr,
            state_group_indices_ptr,
        )


def _copy_page(
    row: int,
    src_col: int,
    dst_col: int,
    block_table_ptrs: torch.Tensor,
    block_table_stride: int,
    base_addrs: torch.Tensor,
    block_strides: torch.Tensor,
    page_bytes: torch.Tensor,
    group_indices: torch.Tensor,
) -> None:
    """Copy one request's page of every layer from one block-table column to another."""
    layers = zip(
        base_addrs.tolist(),
        block_strides.tolist(),
        page_bytes.tolist(),  # our pages are tensors of bytes: elements are bytes
        group_indices.tolist(),
        strict=True,
    )
    for base, stride, nbytes, group in layers:
        table = int(block_table_ptrs[group]) + 4 * row * block_table_stride  # int32 rows
        src, dst = (
            ctypes.c_int32.from_address(table + 4 * col).value for col in (src_col, dst_col)
        )
        ctypes.memmove(base + dst * stride, base + src * stride, nbytes)
