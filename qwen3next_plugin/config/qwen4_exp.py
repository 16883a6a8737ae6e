"""What Qwen4-Exp (Qwen3.8-Flash-Next) has beyond the family: streams, n-grams, an indexer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qwen3next_plugin.config.errors import check_count, missing

MODEL_TYPES = ("qwen4_exp", "qwen4_exp_text", "qwen4_exp_mtp")
# Names of a full-attention layer that has an indexer.
SPARSE = ("indexed_attention", "qwen_sparse_attention")
GATES = ("silu", "sigmoid")
DEFAULTS: Mapping[str, Any] = {  # those of transformers
    "hc_count": 4,
    "hc_lowrank": 320,
    "ple_conv_kernel_size": 4,
    "ngram_size": 3,
    "heads_per_ngram": 8,
    "ngram_vocab_size_base": 20_000_000,
    "make_ngram_vocab_size_divisible_by": 128,
    "split_ngram_parts": 512,
    "seed": 1234,
}
OF_INDEXER = (
    *("indexer_n_heads", "indexer_kv_heads", "indexer_head_dim"),
    *("indexer_budget", "indexer_compress_ratio"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfQwen4Exp:
    """Its fields, as in config.json; 0 in other models."""

    # hyper-connections: the residual has `hc_count` streams
    hc_count: int = 0
    hc_lowrank: int = 0
    # the embedding of a token's n-grams, added to all streams before some linear layers
    ple_layer_ids: tuple[int, ...] = ()  # counted from 1
    ple_embed_dim: int = 0
    ple_conv_kernel_size: int = 0
    ngram_size: int = 0
    heads_per_ngram: int = 0
    ngram_vocab_size_base: int = 0
    make_ngram_vocab_size_divisible_by: int = 0
    split_ngram_parts: int = 0
    seed: int = 0
    eos_token_id: int = 0  # ends an n-gram
    # the indexer, which chooses the tokens that a full-attention layer reads
    indexer_n_heads: int = 0
    indexer_kv_heads: int = 0
    indexer_head_dim: int = 0
    indexer_budget: int = 0
    indexer_compress_ratio: int = 0
    # of linear attention's output
    output_gate_type: str = "silu"

    def has_ngrams(self, i: int) -> bool:
        """Whether the n-gram embedding is added before layer `i`."""
        return i + 1 in self.ple_layer_ids

    @property
    def num_ngram_heads(self) -> int:
        return (self.ngram_size - 1) * self.heads_per_ngram

    @property
    def ngram_head_dim(self) -> int:
        return self.ple_embed_dim // self.num_ngram_heads

    @property
    def ple_conv_reach(self) -> int:
        """Past positions that the n-gram layer's dilated convolution reads."""
        return (self.ple_conv_kernel_size - 1) * self.ngram_size


NAMES = tuple(f.name for f in fields(OfQwen4Exp))


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text model's config, whose types are checked; raises ConfigError."""
    values = dict(DEFAULTS) | {name: raw[name] for name in NAMES if raw.get(name) is not None}
    ids = raw.get("ple_layer_ids") or ()
    for each in ids:
        check_count("ple_layer_ids", each)
    values["ple_layer_ids"] = tuple(sorted(set(ids)))
    values.setdefault("ple_embed_dim", raw.get("hidden_size"))
    values.setdefault("output_gate_type", raw.get("hidden_act", GATES[0]))
    tokens = raw.get("eos_token_id")
    if isinstance(tokens, list | tuple):
        values["eos_token_id"] = next(iter(tokens), 0)
    if ids and tokens in (None, [], ()):
        raise missing("eos_token_id")
    if any(name in values for name in OF_INDEXER):
        for name in OF_INDEXER:
            if name not in values:
                raise missing(name)
    return values
