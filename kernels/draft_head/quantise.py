"""Quantisation of a matrix to int8, with one scale per output channel."""

import torch
from torch import Tensor

LEVELS = 127  # symmetric: -128 is not used
CHUNK = 1 << 18  # elements at a time: in fp32 they fit the cache; of 2^22 it takes 3 times as long


def quantise_channels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(int8, scale) with |weight - scale int8| ≤ scale / 2, and scale = max |weight| / 127.

    Shapes: weight [R, D] of any floating dtype, returns [R, D] int8, [R] fp32

    Raises: ValueError if a weight is not finite.
    """
    R, D = weight.shape
    out = torch.empty(R, D, dtype=torch.int8, device=weight.device)
    scale = torch.empty(R, dtype=torch.float32, device=weight.device)
    channels = max(1, CHUNK // max(1, D))
    for begin in range(0, R, channels):
        x = weight[begin : begin + channels]
        largest = x.abs().amax(-1).float() if D else scale.new_zeros(len(x))
        chunk_scale = (largest / LEVELS).clamp_min_(torch.finfo(torch.float32).tiny)
        out[begin : begin + channels] = (x / chunk_scale[:, None]).round_()
        scale[begin : begin + channels] = chunk_scale
    if not scale.isfinite().all():
        channel = int((~scale.isfinite()).nonzero()[0])
        raise ValueError(f"quantise_channels: output channel {channel} of the weight is not finite")
    return out, scale
