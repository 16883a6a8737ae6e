"""The draft head as its equation, in integers that fp64 holds exactly."""

import torch
from torch import Tensor

CHUNK = 4096  # tokens of the vocabulary at a time, in fp64


def run(x: Tensor, weight: Tensor, scale: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    D, V = x.shape[1], weight.shape[0]
    outside = ((token_ids < 0) | (token_ids >= V)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise RuntimeError(
            f"draft_head: token_ids[{i}] = {int(token_ids[i])} is not one of {V} rows"
        )
    weight, scale = weight[token_ids], scale[token_ids]
    limit = min(2**15 - 1, (2**31 - 1) // (128 * max(1, D)))  # no sum overflows int32
    x = x.float()
    finite = x.isfinite().all(-1, keepdim=True)
    largest = x.abs().amax(-1, keepdim=True) if D else x.new_zeros(len(x), 1)
    usable = finite & (largest >= 1e-30)
    unit = torch.where(usable, largest / limit, 1.0)
    integers = torch.where(usable, (x / unit).round(), 0.0).double()
    sums = torch.cat([integers @ part.double().T for part in weight.split(CHUNK)], 1)  # [N, R]
    scores = sums.float() * scale
    best = scores.argmax(-1)
    values = scores.gather(-1, best[:, None]) * unit
    return token_ids[best].long(), torch.where(finite, values, torch.nan).squeeze(-1)
