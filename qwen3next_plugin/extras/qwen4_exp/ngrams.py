"""The table of a layer's n-gram embedding: how tokens are hashed to its rows, and its shards."""

from collections.abc import Iterator
from functools import cache
from math import ceil

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.kernels.ngram_embedding import NgramHash, ngram_hash


@cache
def hashing(config: Qwen4ExpConfig, i: int) -> NgramHash:
    """That of layer `i` of the trunk, which has n-grams."""
    return ngram_hash(
        ngram_size=config.ngram_size,
        heads_per_ngram=config.heads_per_ngram,
        vocab_size=config.vocab_size,
        table_size=config.ngram_vocab_size_base,
        layer=config.ple_layer_ids.index(i + 1),
        seed=config.seed,
        eos=config.eos_token_id,
    )


def shard_rows(config: Qwen4ExpConfig, i: int) -> Iterator[int]:
    """Rows of each shard of layer `i`'s table in a checkpoint, which has none that are empty."""
    padding = config.make_ngram_vocab_size_divisible_by
    rows = ceil(int(hashing(config, i).sizes.sum()) / padding) * padding
    most = ceil(rows / config.split_ngram_parts)
    for start in range(0, rows, most):
        yield min(most, rows - start)
