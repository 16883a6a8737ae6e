"""Head: the input of the MTP layer, from the next token and the last hidden state."""

from collections.abc import Callable

import torch

Norm = Callable[[torch.Tensor], torch.Tensor]


def fuse(
    *,
    embeds: torch.Tensor,
    hidden_states: torch.Tensor,
    norm_embedding: Norm,
    norm_hidden: Norm,
    fc: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """x = fc([norm_e(embed(t_{i+1})); norm_h(h_i)]), DeepSeek-V3's multi-token prediction input.

    Shapes:
        embeds [T, D] of the tokens at positions i+1
        hidden_states [T, D] at positions i: the trunk's after its final norm, or for further
        drafts the MTP layer's own
        returns [T, D]
    """
    return fc(torch.cat([norm_embedding(embeds), norm_hidden(hidden_states)], dim=-1))
