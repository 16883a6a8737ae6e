"""Token ids moved between the target model and the drafter."""

import torch
from torch import Tensor

from sgl_kernel.operators import operator, ragged


@operator("bonus_tokens")
def fill_bonus_tokens_cpu(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int
) -> None:
    """The last accepted token of each request, which a verify step adds to the accepted drafts.

    Shapes:
        accept_tokens: [N * accept_stride]
        accept_lens: [N], the bonus token included, 1 at least
        bonus_tokens: [N], written
    """
    N = accept_lens.numel()
    last = torch.arange(N, device=accept_lens.device) * accept_stride + accept_lens - 1
    bonus_tokens[:N] = accept_tokens.flatten()[last].to(bonus_tokens.dtype)


@operator("input_ids")
def rotate_input_ids_cpu(
    input_ids: Tensor,
    extend_start_loc: Tensor,
    extend_seq_lens: Tensor,
    topk_index: Tensor,
    select_index: Tensor | None = None,
) -> None:
    """Shift each request's tokens left by one, and write its new token at the end.

    With select_index the new token is written there instead, and the last token is kept.

    Shapes:
        input_ids: [T], written
        extend_start_loc, extend_seq_lens, select_index: [N], select_index as an index into T
        topk_index: [N] or [N, 1], the new tokens
    """
    row, column = ragged((extend_seq_lens - 1).clamp(min=0))
    to = extend_start_loc[row] + column
    input_ids[to] = input_ids[to + 1]
    filled = extend_seq_lens > 0
    last = extend_start_loc + extend_seq_lens - 1 if select_index is None else select_index
    input_ids[last[filled]] = topk_index.flatten()[: filled.numel()][filled].to(input_ids.dtype)
