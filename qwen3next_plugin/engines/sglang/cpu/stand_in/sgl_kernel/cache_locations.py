"""Writes and reads the table of each request's KV locations.

Shapes, everywhere: N requests; `req_to_token` [R, M] int32, KV location of each request's tokens;
`req_pool_indices` [N], each request's line in it; the KV locations of a batch are one flat list.
"""

import torch
from torch import Tensor

from sgl_kernel.operators import NAMESPACE, operator, ragged


@operator("req_to_token")
def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """req_to_token[request, start:end] = its locations in out_cache_loc."""
    row, column = ragged(end_offset - start_offset)
    slots = out_cache_loc[: row.numel()].to(req_to_token.dtype)
    req_to_token[req_pool_indices[row], start_offset[row] + column] = slots


@operator("out_cache_loc")
def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """out_cache_loc = the locations of req_to_token[request, start:end]; the rest is unchanged."""
    row, column = ragged(end_offset - start_offset)
    slots = req_to_token[req_pool_indices[row], start_offset[row] + column]
    out_cache_loc[: row.numel()] = slots.to(out_cache_loc.dtype)


@operator("out_cache_loc")
def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
) -> None:
    """out_cache_loc = each request's first topk * steps locations after its committed tokens."""
    drafts = torch.arange(topk * speculative_num_steps, device=seq_lens.device)
    slots = req_to_token[req_pool_indices[:, None], seq_lens[:, None] + drafts].flatten()
    out_cache_loc[: slots.numel()] = slots.to(out_cache_loc.dtype)


@operator("accept_out_cache_loc")
def fill_accept_out_cache_loc_cpu(
    accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor
) -> None:
    """The locations of the accepted tokens (accept_index is -1 for the others), in order."""
    index = accept_index.flatten()
    slots = out_cache_loc[index[index >= 0]]
    accept_out_cache_loc[: slots.numel()] = slots.to(accept_out_cache_loc.dtype)


@operator()
def build_draft_decode_metadata_cpu(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    topk: int,
    num_steps: int,
    pool_len: int,
) -> Tensor:
    """A table with a line per candidate: the committed locations, then its own drafts.

    A request's drafts follow its committed tokens, candidate by candidate, num_steps each.
    The table is as wide as the longest line; the rest of a shorter one is never read.

    Shapes: returns [N * topk, max(seq_lens) + num_steps] int32
    """
    longest = int(seq_lens.max()) if seq_lens.numel() else 0
    columns = torch.arange(longest + num_steps, device=seq_lens.device)
    draft = columns - seq_lens[:, None, None]  # [N, 1, W]
    candidate = torch.arange(topk, device=seq_lens.device)[:, None]
    own = (draft >= 0) & (draft < num_steps)
    source = torch.where(own, columns + candidate * num_steps, columns)  # [N, topk, W]
    source = source.clamp(max=req_to_token.shape[1] - 1)
    return req_to_token[req_pool_indices[:, None, None], source].flatten(0, 1)


@torch.library.register_fake(f"{NAMESPACE}::build_draft_decode_metadata_cpu")
def _(
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    topk: int,
    num_steps: int,
    pool_len: int,
) -> Tensor:
    width = torch.library.get_ctx().new_dynamic_size()
    return req_to_token.new_empty(req_pool_indices.shape[0] * topk, width)
