"""How n-grams of tokens are hashed: which row of its part of the table each head takes."""

from itertools import count, islice
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15  # of splitmix64, as the next two
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
LAYER = 10007  # between the seeds of two layers


class NgramHash(NamedTuple):
    """The hash of one layer; n is the longest n-gram, and n-grams have 2 to n tokens.

    The i-th token before the hashed one, or `eos` if an end or the sequence's start lies between,
    is multiplied by multipliers[i]; the products of an n-gram are combined by XOR.

    Shapes: multipliers [n]; sizes, offsets [heads]: the rows of each head's part of the table, and
        the first of them; as many heads for each length. All int64.
    """

    multipliers: Tensor
    sizes: Tensor
    offsets: Tensor
    eos: int


def ngram_hash(
    *,
    ngram_size: int,
    heads_per_ngram: int,
    vocab_size: int,
    table_size: int,
    layer: int,
    seed: int,
    eos: int,
) -> NgramHash:
    """The hash of the `layer`-th layer that has a table, from 0.

    A head's part has a prime number of rows, from `table_size` on the next that no head before has,
    in layers before either.

    Source: `Qwen4ExpTextNGramEmbedding` of transformers.
    """
    heads = (ngram_size - 1) * heads_per_ngram
    largest = max(1, ((1 << 63) - 1) // max(vocab_size, 1) // 2)
    start = seed + LAYER * layer
    states = [start + GAMMA * (i + 1) for i in range(ngram_size)]
    multipliers = torch.tensor([2 * (splitmix64(state) % largest) + 1 for state in states])
    primes = filter(is_prime, count(table_size))
    sizes = torch.tensor([*islice(primes, layer * heads, (layer + 1) * heads)])
    return NgramHash(multipliers, sizes, sizes.cumsum(0) - sizes, eos)


def splitmix64(value: int) -> int:
    """The generator's output for this state, of which 64 bits count."""
    value = (value + GAMMA) & MASK
    value = ((value ^ (value >> 30)) * FACTORS[0]) & MASK
    value = ((value ^ (value >> 27)) * FACTORS[1]) & MASK
    return value ^ (value >> 31)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, isqrt(n) + 1))
