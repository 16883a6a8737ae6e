"""Configs of Qwen4-Exp (Qwen3.8-Flash-Next): streams, n-grams, an indexer."""

import sys
from pathlib import Path

import pytest

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, is_of_family
from qwen3next_plugin.extras.qwen4_exp.config import DEFAULTS, OF_INDEXER

sys.path.insert(0, str(Path(__file__).parents[3]))  # examples/ is not installed

from examples.qwen4_exp_tiny import CONFIG


def read(**changes):
    """CONFIG with changes; None: absent."""
    raw = {name: value for name, value in (CONFIG | changes).items() if value is not None}
    return Qwen3NextConfig.from_hf(raw)


def test_fields_are_read():
    config = read()
    assert (config.layout, config.hc_count, config.hc_lowrank) == ("flat", 4, 16)
    assert config.ple_layer_ids == (2, 5)
    assert [config.has_ngrams(i) for i in range(6)] == [False, True, False, False, True, False]
    assert (config.num_ngram_heads, config.ngram_head_dim, config.ple_conv_reach) == (16, 8, 9)
    assert (config.indexer_n_heads, config.indexer_budget) == (16, 64)
    assert config.output_gate_type == "sigmoid"
    assert config.num_linear_layers == 6


def test_defaults_are_those_of_transformers():
    from transformers.models.qwen4_exp.configuration_qwen4_exp import Qwen4ExpTextConfig

    theirs = Qwen4ExpTextConfig()
    assert {name: getattr(theirs, name) for name in DEFAULTS} == DEFAULTS
    left_out = dict.fromkeys((*DEFAULTS, *OF_INDEXER, "ple_layer_ids", "output_gate_type"))
    config = read(**left_out)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.ple_layer_ids, config.ple_embed_dim) == ((), 128)
    assert (config.indexer_n_heads, config.output_gate_type) == (0, "silu")


@pytest.mark.parametrize("name", ["full_attention", "indexed_attention", "qwen_sparse_attention"])
def test_each_name_of_sparse_attention(name):
    types = ["linear_attention"] * 3 + [name]
    assert (
        read(layer_types=types * 2)
        == read()
        == read(layer_types=types * 2, full_attention_interval=None)
    )


def test_nested_and_alone_read_the_same():
    text = {name: value for name, value in CONFIG.items() if name != "architectures"}
    for outer in ("qwen4_exp", "qwen4_exp_mtp"):
        assert Qwen3NextConfig.from_hf({"model_type": outer, "text_config": text}) == read()


def test_several_ends_of_text_and_repeated_layers():
    config = read(eos_token_id=[7, 8], ple_layer_ids=[5, 2, 5])
    assert (config.eos_token_id, config.ple_layer_ids) == (7, (2, 5))


def test_other_models_have_none_of_it():
    plain = {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"]}
    config = read(**plain, seed="any", hc_count=3, output_gate_type="any")
    assert type(config) is Qwen3NextConfig
    assert not config.sigmoid_gate


def test_it_is_of_the_family():
    assert is_of_family({"model_type": "qwen4_exp"})
    assert is_of_family({"architectures": ["Qwen4ExpForConditionalGeneration"]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hc_count": 1}, "hc_count = 1: must be a whole number of at least 2"),
        ({"hc_count": 10**6}, "hc_count = 1000000: must be at most 16"),
        ({"hc_lowrank": 0}, "hc_lowrank = 0"),
        ({"hc_lowrank": "a"}, "hc_lowrank = 'a'"),
        ({"num_experts": 0}, "num_experts = 0: must be a whole number of at least 1"),
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size = 0"),
        ({"mlp_only_layers": [0], "intermediate_size": 8}, "every layer has experts"),
        ({"output_gate_type": "tanh"}, "output_gate_type = 'tanh': linear attention's gate is one"),
        ({"ple_layer_ids": [9]}, "ple_layer_ids = 9: layers are counted from 1 to 8"),
        ({"ple_layer_ids": [0]}, "ple_layer_ids = 0"),
        ({"ple_layer_ids": [[1]]}, "ple_layer_ids = [1]"),
        ({"ple_layer_ids": 2}, "ple_layer_ids = 2: must be a list"),
        ({"ple_layer_ids": [4]}, "ple_layer_ids = 4: n-grams are added before linear-attention"),
        ({"ngram_size": 1}, "ngram_size = 1: must be a whole number of at least 2"),
        ({"ngram_size": 99}, "ngram_size = 99: must be at most 8"),
        ({"ple_conv_kernel_size": 3}, "ple_conv_kernel_size = 3: the convolution kernels"),
        ({"ple_embed_dim": 100}, "ple_embed_dim = 100: must be a multiple of the 16 n-gram heads"),
        ({"eos_token_id": None}, "eos_token_id is missing"),
        ({"eos_token_id": []}, "eos_token_id is missing"),
        ({"eos_token_id": -1}, "eos_token_id = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"ngram_vocab_size_base": 2**31 - 1, "heads_per_ngram": 64}, None),
        ({"ngram_vocab_size_base": 2**40}, "ngram_vocab_size_base = 1099511627776"),
        ({"indexer_budget": None}, "indexer_budget is missing"),
        (
            {"indexer_budget": 66},
            "indexer_budget = 66: must be a multiple of indexer_compress_ratio",
        ),
        ({"indexer_compress_ratio": 5}, "indexer_compress_ratio = 5: must divide 32"),
        ({"indexer_kv_heads": 2}, "indexer_kv_heads = 2: the indexer has one key head"),
        ({"indexer_head_dim": 4}, "indexer_head_dim = 4: attention rotates 8 dims of a head"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused(changes, words):
    if changes.get("heads_per_ngram"):
        changes = changes | {"ple_embed_dim": 128 * 16}
    if words is None:
        assert read(**changes)
        return
    with pytest.raises(ConfigError) as caught:
        read(**changes)
    assert words in str(caught.value)
