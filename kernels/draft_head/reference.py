"""The draft head as its equation, in integers that fp64 holds exactly."""

import torch
from torch import Tensor

CHUNK = 4096  # rows in fp64 at a time


def run(x: Tensor, weight: Tensor, scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    D, V = x.shape[1], weight.shape[0]
    outside = ((rows < 0) | (rows >= V)).nonzero()
    if len(outside):
        i = int(outside[0])
        raise RuntimeError(f"draft_head: rows[{i}] = {int(rows[i])} is not one of {V} rows")
    weight, scale = weight[rows], scale[rows]
    limit = min(2**15 - 1, (2**31 - 1) // (128 * max(1, D)))  # no sum leaves int32
    x = x.float()
    finite = x.isfinite().all(-1, keepdim=True)
    largest = x.abs().amax(-1, keepdim=True) if D else x.new_zeros(len(x), 1)
    usable = finite & (largest >= 1e-30)
    step = torch.where(usable, largest / limit, 1.0)
    integers = torch.where(usable, (x / step).round(), 0.0).double()
    sums = torch.cat([integers @ part.double().T for part in weight.split(CHUNK)], 1)  # [N, R]
    scores = sums.float() * scale
    best = scores.argmax(-1)
    values = scores.gather(-1, best[:, None]) * step
    return rows[best].long(), torch.where(finite, values, torch.nan).squeeze(-1)
