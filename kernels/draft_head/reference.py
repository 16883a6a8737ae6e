"""The draft head as its equation, in integers that fp64 holds exactly."""

import torch
from torch import Tensor

CHUNK = 4096  # rows in fp64 at a time


def draft_head(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    D = x.shape[1]
    limit = min(2**15 - 1, (2**31 - 1) // (128 * max(1, D)))  # no sum leaves int32
    x = x.float()
    finite = x.isfinite().all(-1, keepdim=True)
    largest = x.abs().amax(-1, keepdim=True) if D else x.new_zeros(len(x), 1)
    usable = finite & (largest >= 1e-30)
    step = torch.where(usable, largest / limit, 1.0)
    integers = torch.where(usable, (x / step).round(), 0.0).double()
    sums = torch.cat([integers @ rows.double().T for rows in weight.split(CHUNK)], 1)  # [N, R]
    scores = sums.float() * scale
    rows = scores.argmax(-1)
    values = scores.gather(-1, rows[:, None]) * step
    return rows, torch.where(finite, values, torch.nan).squeeze(-1)
