"""The hash that SGLang uses as random numbers of requests with a seed."""

import torch
from torch import Tensor

from sgl_kernel.operators import NAMESPACE, operator

LOW = 0xFFFFFFFF  # words of 32 bits in int64: an overflow changes only bits that are masked off


@operator()
def murmur_hash32_cpu(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3 (x86, 32 bits) of each row's seed and position, and of each column.

    Shapes:
        seed: [N], 64 bits; positions: [N] and col_indices: [M], their lower 32 bits
        returns [N, M] uint32

    Source: Appleby, MurmurHash3.cpp, of the 16 bytes (seed, position, column) from state 0.
    """
    words = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.long()
    state = torch.zeros_like(words)
    for word in (words & LOW, (words >> 32) & LOW, positions.long() & LOW):
        state = _mix(state, word)
    state = _mix(state[:, None], col_indices.long() & LOW)
    return _finish(state ^ 16).to(torch.uint32)


@torch.library.register_fake(f"{NAMESPACE}::murmur_hash32_cpu")
def _(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    return seed.new_empty((seed.shape[0], col_indices.shape[0]), dtype=torch.uint32)


def _mix(state: Tensor, word: Tensor) -> Tensor:
    word = (_rotate(word * 0xCC9E2D51 & LOW, 15) * 0x1B873593) & LOW
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & LOW


def _rotate(word: Tensor, bits: int) -> Tensor:
    return ((word << bits) | (word >> (32 - bits))) & LOW


def _finish(state: Tensor) -> Tensor:
    state = ((state ^ (state >> 16)) * 0x85EBCA6B) & LOW
    state = ((state ^ (state >> 13)) * 0xC2B2AE35) & LOW
    return state ^ (state >> 16)
