"""What Qwen4-Exp's config has beyond the family's: streams, n-grams, an indexer."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.config.errors import check_count, complaint, missing, shown
from qwen3next_plugin.config.fields import BY_TYPE, Check
from qwen3next_plugin.config.kinds import ConfigKind
from qwen3next_plugin.config.sizes import CONV_WIDTH

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
PAGE = 32  # tokens of which an engine's page has a multiple
MOST_STREAMS, MOST_GRAM, MOST_ROWS = 16, 8, 2**40


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen4ExpConfig(Qwen3NextConfig):
    """One model on `tp_size` ranks, with the fields that only it has."""

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

    def check_own(self) -> None:
        check(self)

    @property
    def sigmoid_gate(self) -> bool:
        return self.output_gate_type == "sigmoid"

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


def of_kind(config: Qwen3NextConfig) -> Qwen4ExpConfig:
    """The config of a model that an engine has found to be Qwen4-Exp."""
    assert isinstance(config, Qwen4ExpConfig)
    return config


def _natural(name: str, value: object) -> None:
    check_count(name, value, least=0)


def _tokens(name: str, value: object) -> None:
    for token in value if isinstance(value, list | tuple) else (value,):
        _natural(name, token)


OF_FAMILY = {f.name for f in fields(Qwen3NextConfig)}
CHECKS: Mapping[str, Check] = {
    **{f.name: BY_TYPE[f.type] for f in fields(Qwen4ExpConfig) if f.name not in OF_FAMILY},
    "eos_token_id": _tokens,
    "seed": _natural,
}


def read(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a text model's config, whose types are checked; raises ConfigError."""
    values = dict(DEFAULTS) | {name: raw[name] for name in CHECKS if raw.get(name) is not None}
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


def check(c: Qwen4ExpConfig) -> None:
    """Raise ConfigError unless the model can be computed; the types of fields are right."""
    check_count("hc_count", c.hc_count, least=2, most=MOST_STREAMS)
    check_count("hc_lowrank", c.hc_lowrank)
    for name in ("num_experts", "shared_expert_intermediate_size"):
        check_count(name, getattr(c, name))
    if c.num_moe_layers < c.num_hidden_layers:
        raise complaint("mlp_only_layers", c.mlp_only_layers, "every layer has experts; remove it")
    if c.output_gate_type not in GATES:
        fix = f"linear attention's gate is one of {', '.join(GATES)}"
        raise complaint("output_gate_type", c.output_gate_type, fix)
    if c.ple_layer_ids:
        _check_ngrams(c)
    if c.indexer_n_heads:
        _check_indexer(c)


def _check_ngrams(c: Qwen4ExpConfig) -> None:
    for each in c.ple_layer_ids:
        if each > c.num_hidden_layers:
            fix = f"layers are counted from 1 to {c.num_hidden_layers}"
            raise complaint("ple_layer_ids", each, fix)
        if c.layer_types[each - 1] != "linear_attention":
            fix = "n-grams are added before linear-attention layers only"
            raise complaint("ple_layer_ids", each, fix)
    check_count("ngram_size", c.ngram_size, least=2, most=MOST_GRAM)
    check_count("heads_per_ngram", c.heads_per_ngram, most=64)
    if c.ple_conv_kernel_size != CONV_WIDTH:
        fix = f"the convolution kernels are of width {CONV_WIDTH} only"
        raise complaint("ple_conv_kernel_size", c.ple_conv_kernel_size, fix)
    if c.ple_embed_dim % c.num_ngram_heads:
        fix = f"must be a multiple of the {c.num_ngram_heads} n-gram heads"
        raise complaint("ple_embed_dim", c.ple_embed_dim, fix)
    check_count("eos_token_id", c.eos_token_id, least=0)
    heads = len(c.ple_layer_ids) * c.num_ngram_heads
    if heads > 4096 or heads * c.ngram_vocab_size_base > MOST_ROWS:
        fix = f"with {shown(heads)} n-gram heads it is too much; copy both from the release"
        raise complaint("ngram_vocab_size_base", c.ngram_vocab_size_base, fix)


def _check_indexer(c: Qwen4ExpConfig) -> None:
    if c.indexer_kv_heads != 1:
        raise complaint("indexer_kv_heads", c.indexer_kv_heads, "the indexer has one key head")
    if PAGE % c.indexer_compress_ratio:
        fix = f"must divide {PAGE}: a block of tokens is in one page"
        raise complaint("indexer_compress_ratio", c.indexer_compress_ratio, fix)
    if c.indexer_budget % c.indexer_compress_ratio:
        fix = f"must be a multiple of indexer_compress_ratio = {c.indexer_compress_ratio}"
        raise complaint("indexer_budget", c.indexer_budget, fix)
    if c.rotary_dim > c.indexer_head_dim:
        fix = f"attention rotates {c.rotary_dim} dims of a head, and the indexer as many"
        raise complaint("indexer_head_dim", c.indexer_head_dim, fix)


KIND = ConfigKind(
    model_types=dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "qwen4_exp_mtp"), ("flat", True)),
    architectures="Qwen4Exp",
    config=Qwen4ExpConfig,
    checks=CHECKS,
    read=read,
    full_attention=SPARSE,
)
