"""Tensors that only checkpoints of Qwen4-Exp have: streams, n-grams, an indexer."""

import re

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.ngrams import shard_rows
from qwen3next_plugin.model.kinds import Frame, Shapes

TABLE = "ple.ple_embedding.ngram_embedding"
TABLE_SCALE = "ngram_embedding.weight_scale"  # of a table in FP8
# Of n-gram embeddings, what follows from the config, and what `ple.py` reads; of the last mixer,
# what nothing reads.
UNREAD = re.compile(
    r"\.ple_embedding\.(layer_multipliers|ngram_heads_\w+|token_lookup|hashstats_\w+)$"
    rf"|\.ple_embedding\.{TABLE_SCALE}$"
    r"|^(model|mtp)\.hyper_connection_mixer\.block_inject_weight\.weight$"
)


def frame(config: Qwen4ExpConfig) -> Frame:
    """All of them."""
    D, wide = config.hidden_size, config.hc_count * config.hidden_size
    return Frame(
        residual=_mixer("attn_hyper_connection.", config) | _mixer("mlp_hyper_connection.", config),
        end=_mixer("hyper_connection_mixer.", config, injects=False),
        mtp_input={
            "fc_embedding.weight": (D, D),
            "fc_hidden.weight": (D, D),
            "pre_fc_norm_embedding.weight": (D,),
            "pre_fc_norm_hidden.weight": (wide,),
        },
        attention=_indexer(config) if config.indexer_n_heads else {},
        layers={i - 1: _ngrams(config) | _table(config, i - 1) for i in config.ple_layer_ids},
    )


def _mixer(prefix: str, config: Qwen4ExpConfig, *, injects: bool = True) -> Shapes:
    wide, rank = config.hc_count * config.hidden_size, config.hc_lowrank
    shapes: Shapes = {
        f"{prefix}hc_norm.weight": (wide,),
        f"{prefix}input_mix_weight_down.weight": (rank, wide),
        f"{prefix}input_mix_weight_up.weight": (wide, rank),
    }
    if injects:
        shapes[f"{prefix}block_inject_weight.weight"] = (config.hc_count, wide)
    return shapes


def _indexer(config: Qwen4ExpConfig) -> Shapes:
    """The indexer of a full-attention layer."""
    dim, heads = config.indexer_head_dim, config.indexer_n_heads + config.indexer_kv_heads
    return {
        "self_attn.indexer.index_qk_proj.weight": (heads * dim, config.hidden_size),
        "self_attn.indexer.q_layernorm.weight": (dim,),
        "self_attn.indexer.k_layernorm.weight": (dim,),
    }


def _ngrams(config: Qwen4ExpConfig) -> Shapes:
    """The n-gram embedding of a linear layer, but for its table."""
    D, wide, E = config.hidden_size, config.hc_count * config.hidden_size, config.ple_embed_dim
    shapes: Shapes = {
        "ple.key_proj.weight": (wide, E),
        "ple.value_proj.weight": (D, E),
        "ple.conv1d.weight": (wide, 1, config.ple_conv_kernel_size),
    }
    return shapes | {f"ple.norm_{name}.weight": (wide,) for name in ("key", "query", "conv")}


def _table(config: Qwen4ExpConfig, i: int) -> Shapes:
    """The table of layer `i`'s n-gram embedding, in shards."""
    return {
        f"{TABLE}.shard_{s}.weight": (rows, config.ngram_head_dim)
        for s, rows in enumerate(shard_rows(config, i))
    }


def table_names(config: Qwen4ExpConfig, i: int) -> list[str]:
    """The tensors of that table, in order."""
    shards = range(len([*shard_rows(config, i)]))
    return [f"model.layers.{i}.{TABLE}.shard_{s}.weight" for s in shards]


def scale_name(i: int) -> str:
    """The tensor of that table's scale, if it is in FP8."""
    return f"model.layers.{i}.ple.ple_embedding.{TABLE_SCALE}"
