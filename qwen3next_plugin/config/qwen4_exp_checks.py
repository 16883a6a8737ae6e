"""What a config of Qwen4-Exp must satisfy to be served, beside what all models must."""

from qwen3next_plugin.config.errors import check_count, complaint, shown
from qwen3next_plugin.config.qwen4_exp import GATES
from qwen3next_plugin.config.sizes import CONV_WIDTH, Sizes

PAGE = 32  # tokens of which an engine's page has a multiple
MOST_STREAMS, MOST_GRAM, MOST_ROWS = 16, 8, 2**40


def check(c: Sizes) -> None:
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


def _check_ngrams(c: Sizes) -> None:
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


def _check_indexer(c: Sizes) -> None:
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
