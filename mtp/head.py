"""The MTP head's input: what it knows of the next token and of the trunk's last state."""

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
        embeds [T, D] of the tokens at positions i+1, hidden_states [T, D] of the positions i:
        the trunk's after its final norm, or the head's own when it drafts further
        returns [T, D]
    """
    return fc(torch.cat([norm_embedding(embeds), norm_hidden(hidden_states)], dim=-1))
