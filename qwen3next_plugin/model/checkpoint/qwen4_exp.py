"""Tensors that only checkpoints of Qwen4-Exp have: streams, n-grams, an indexer."""

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.layouts import TABLE_SCALE, Shapes
from qwen3next_plugin.model.ngrams import shard_rows

TABLE = "ple.ple_embedding.ngram_embedding"


def connections(config: Qwen3NextConfig) -> Shapes:
    """The two hyper-connections of a layer."""
    return _mixer("attn_hyper_connection.", config) | _mixer("mlp_hyper_connection.", config)


def end(config: Qwen3NextConfig) -> Shapes:
    """The mixer of the last layer's streams."""
    return _mixer("hyper_connection_mixer.", config, injects=False)


def _mixer(prefix: str, config: Qwen3NextConfig, *, injects: bool = True) -> Shapes:
    wide, rank = config.hc_count * config.hidden_size, config.hc_lowrank
    shapes: Shapes = {
        f"{prefix}hc_norm.weight": (wide,),
        f"{prefix}input_mix_weight_down.weight": (rank, wide),
        f"{prefix}input_mix_weight_up.weight": (wide, rank),
    }
    if injects:
        shapes[f"{prefix}block_inject_weight.weight"] = (config.hc_count, wide)
    return shapes


def indexer(config: Qwen3NextConfig) -> Shapes:
    """The indexer of a full-attention layer."""
    dim, heads = config.indexer_head_dim, config.indexer_n_heads + config.indexer_kv_heads
    return {
        "self_attn.indexer.index_qk_proj.weight": (heads * dim, config.hidden_size),
        "self_attn.indexer.q_layernorm.weight": (dim,),
        "self_attn.indexer.k_layernorm.weight": (dim,),
    }


def ngrams(config: Qwen3NextConfig) -> Shapes:
    """The n-gram embedding of a linear layer, but for its table."""
    D, wide, E = config.hidden_size, config.hc_count * config.hidden_size, config.ple_embed_dim
    shapes: Shapes = {
        "ple.key_proj.weight": (wide, E),
        "ple.value_proj.weight": (D, E),
        "ple.conv1d.weight": (wide, 1, config.ple_conv_kernel_size),
    }
    return shapes | {f"ple.norm_{name}.weight": (wide,) for name in ("key", "query", "conv")}


def table(config: Qwen3NextConfig, i: int) -> Shapes:
    """The table of layer `i`'s n-gram embedding, in shards."""
    return {
        f"{TABLE}.shard_{s}.weight": (rows, config.ngram_head_dim)
        for s, rows in enumerate(shard_rows(config, i))
    }


def table_names(config: Qwen3NextConfig, i: int) -> list[str]:
    """The tensors of that table, in order."""
    shards = range(len([*shard_rows(config, i)]))
    return [f"model.layers.{i}.{TABLE}.shard_{s}.weight" for s in shards]


def scale_name(i: int) -> str:
    """The tensor of that table's scale, if it is in FP8."""
    return f"model.layers.{i}.ple.ple_embedding.{TABLE_SCALE}"


def mtp_input(config: Qwen3NextConfig) -> Shapes:
    """What makes the MTP layer's streams of an embedding and the trunk's streams."""
    D = config.hidden_size
    return {"fc_embedding.weight": (D, D), "fc_hidden.weight": (D, D)}
