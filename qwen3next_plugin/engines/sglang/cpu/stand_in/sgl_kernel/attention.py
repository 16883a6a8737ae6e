"""Attention over the paged KV cache, for SGLang's CPU attention backend.

Shapes, everywhere: T new tokens of N requests; q and o [T, Hq, D]; caches [locations, Hkv, D];
`req_to_token` [R, M] int32, KV location of each request's tokens; `req_pool_indices` [N], each
request's line in it; `seq_lens` [N] int64, the new tokens included.
"""

import torch
from torch import Tensor

from sgl_kernel.operators import operator


@operator("k_buffer", "v_buffer", "o")
def decode_attention_cpu(
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    o: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """One new token for each request: store its key and value at location `loc`, then attend.

    Raises: NotImplementedError: an option that Qwen3-Next does not use; see `_check`.
    """
    _check(
        k_scale=k_scale, v_scale=v_scale, logit_cap=logit_cap, is_cross_attn=is_cross_attn,
        encoder_lens=encoder_lens, sinks=sinks, window=sliding_window_size, seq_lens=seq_lens,
    )  # fmt: skip
    if key is not None and value is not None:
        for cache, new in ((k_buffer, key), (v_buffer, value)):
            cache.index_copy_(0, loc.long(), new.reshape(-1, *cache.shape[1:]).to(cache.dtype))
    N = seq_lens.numel()
    starts = torch.arange(N + 1, dtype=torch.int32)
    _attend(q, k_buffer, v_buffer, o, req_to_token, req_pool_indices, starts, seq_lens, sm_scale)


@operator("o")
def extend_attention_cpu(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window_size: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Several new tokens for each request (a prefill chunk or a verify pass), in the cache already.

    Shapes:
        extend_seq_lens, extend_start_loc: [N], each request's new tokens and where they start
        tree_mask: flat bool, n x n for each request of n new tokens; None: causal

    Raises: NotImplementedError: an option that Qwen3-Next does not use; see `_check`.
    """
    _check(
        k_scale=k_scale, v_scale=v_scale, logit_cap=logit_cap, is_cross_attn=is_cross_attn,
        encoder_lens=encoder_lens, sinks=sinks, window=sliding_window_size, seq_lens=seq_lens,
        is_causal=is_causal,
    )  # fmt: skip
    end = extend_start_loc[-1:] + extend_seq_lens[-1:]
    starts = torch.cat([extend_start_loc, end]).to(torch.int32)
    _attend(
        q, k_buffer, v_buffer, o, req_to_token, req_pool_indices, starts, seq_lens, sm_scale,
        tree_mask,
    )  # fmt: skip


def _attend(
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    o: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    scale: float,
    tree_mask: Tensor | None = None,
) -> None:
    if not seq_lens.numel():
        return
    # Imported late: SGLang imports this package in every process, and most run no attention.
    from qwen3next_plugin.kernels.paged_attention import paged_attention

    attended = paged_attention(
        q=q, key_cache=k_buffer, value_cache=v_buffer, token_table=req_to_token,
        table_row=req_pool_indices, query_start_loc=starts, seq_lens=seq_lens, scale=scale,
        tree_mask=tree_mask,
    )  # fmt: skip
    o.copy_(attended)


def _check(
    *,
    k_scale: float,
    v_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    window: int,
    seq_lens: Tensor,
    is_causal: bool = True,
) -> None:
    """Refuse options that the kernel does not compute, by name."""
    windowed = window > 0 and seq_lens.numel() > 0 and int(seq_lens.max()) > window
    asked = {
        "a scaled KV cache (fp8)": k_scale != 1 or v_scale != 1,
        "a logit cap": logit_cap > 0,
        "cross attention": is_cross_attn or encoder_lens is not None,
        "attention sinks": sinks is not None,
        f"a sliding window of {window} tokens": windowed,
        "attention that is not causal": not is_causal,
    }
    unserved = [what for what, is_asked in asked.items() if is_asked]
    if unserved:
        raise NotImplementedError(
            f"sgl_kernel's attention on CPU, qwen3next_plugin's stand-in: {', '.join(unserved)}; "
            "--attention-backend torch_native may serve it"
        )
