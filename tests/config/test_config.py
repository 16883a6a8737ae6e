"""Qwen3NextConfig: derived sizes, and errors that name field, value and fix."""

import contextlib
import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_num_speculative_tokens,
    read_config,
)
from qwen3next_plugin.model.checkpoint.layouts import output_sizes
from released import RELEASED_80B, read


def transformers_config(**changes):
    from transformers import Qwen3NextConfig as Theirs

    return Theirs(**(copy.deepcopy(RELEASED_80B) | changes))


def test_sizes_of_the_80b():
    config = read()
    assert (config.key_dim, config.value_dim, config.conv_dim) == (2048, 4096, 8192)
    assert [output_sizes(config, name, "grouped") for name in ("qkvz", "ba")] == [[12288], [64]]
    assert (config.q_proj_size, config.kv_proj_size, config.attention_dim) == (8192, 512, 4096)
    assert (config.rotary_dim, config.max_length) == (64, 262144)
    assert (config.num_linear_layers, config.num_attention_layers) == (36, 12)
    assert [i for i in range(8) if config.layer_types[i] == "full_attention"] == [3, 7]
    assert config.num_moe_layers == 48
    assert config.num_nextn_predict_layers == 1


def test_sizes_of_one_rank():
    config = read(tp_size=4)
    assert config.linear_num_key_heads_per_rank == 4
    assert config.linear_num_value_heads_per_rank == 8
    assert config.num_attention_heads_per_rank == 4
    assert config.num_key_value_heads_per_rank == 1  # two heads, each on two ranks
    assert (config.conv_dim_per_rank, config.value_dim_per_rank) == (2048, 1024)
    assert config.conv_dim_per_rank == 2048


def test_dict_and_transformers_config_agree():
    assert Qwen3NextConfig.from_hf(transformers_config()) == read()


def test_saved_by_transformers_5_reads_the_same(tmp_path):
    transformers_config().save_pretrained(tmp_path)
    assert Qwen3NextConfig.from_hf(read_config(tmp_path)) == read()


def test_frozen_hashable_and_pickled():
    config = read()
    assert hash(config) == hash(read())
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1


def test_replace_is_checked_too():
    with pytest.raises(ConfigError, match="tp_size = 3"):
        dataclasses.replace(read(), tp_size=3)


def test_from_hf_leaves_its_argument_alone():
    raw = RELEASED_80B | {"rope_scaling": {"type": "yarn", "factor": 2.0}}
    before = copy.deepcopy(raw)
    Qwen3NextConfig.from_hf(raw)
    assert raw == before


def test_drafter_copy_is_read():
    assert read(model_type="qwen3_next_mtp") == read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe'"),
        ({"model_type": "absent"}, "model_type = None"),
        ({"hidden_size": "absent"}, "hidden_size is missing"),
        ({"num_experts": "absent"}, "num_experts is missing"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"hidden_size": 0}, "hidden_size = 0: must be a whole number of at least 1"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"hidden_size": "2048"}, "hidden_size = '2048'"),
        ({"num_experts": True}, "num_experts = True"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': must be true or false"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3: must be a list"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn': must be an object"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': the kernels compute 'silu' only"),
        ({"full_attention_interval": "absent"}, "full_attention_interval are missing"),
        ({"full_attention_interval": 0}, "full_attention_interval = 0"),
        ({"layer_types": ["full_attention"] * 48}, "full_attention_interval = 4: it disagrees"),
        ({"mlp_only_layers": [48]}, "mlp_only_layers = 48: layers are 0 to 47"),
        ({"mlp_only_layers": [1], "intermediate_size": "absent"}, "intermediate_size = 0"),
        ({"linear_num_value_heads": 24}, "must be a multiple of linear_num_key_heads = 16"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads = 3"),
        ({"linear_key_head_dim": 100}, "linear_key_head_dim = 100: no kernel has it"),
        ({"linear_key_head_dim": 512}, "linear_key_head_dim = 512: no kernel has it"),
        ({"linear_value_head_dim": 8}, "linear_value_head_dim = 8: no kernel has it"),
        ({"head_dim": 255}, "head_dim = 255"),
        ({"linear_conv_kernel_dim": 3}, "linear_conv_kernel_dim = 3: .* width 4 only"),
        ({"num_experts_per_tok": 513}, "num_experts_per_tok = 513: cannot exceed"),
        ({"num_experts_per_tok": "absent"}, "num_experts_per_tok = 0"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size = 0"),
        ({"num_experts": 0, "intermediate_size": 0}, "intermediate_size = 0"),
        ({"partial_rotary_factor": 0.0}, r"partial_rotary_factor = 0.0: must be in \(0, 1\]"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"partial_rotary_factor": 0.001}, "rotary_dim = 0"),
        ({"partial_rotary_factor": 33 / 256}, "rotary_dim = 33"),
        ({"partial_rotary_factor": "absent"}, "partial_rotary_factor is missing"),
        ({"rope_theta": "absent"}, "rope_theta is missing"),
        ({"rope_theta": -1.0}, "rope_theta = -1.0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, r"rope_parameters\.factor = None"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}},
            "rope_theta = 10000000: rope_scaling says",
        ),
    ],
)
def test_error_names_field_value_and_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        read(**changes)


@pytest.mark.parametrize(
    ("layer_types", "message"),
    [
        (["linear_attention"] * 47, r"len\(layer_types\) = 47: num_hidden_layers is 48"),
        (["linear_attention"] * 47 + ["sliding_attention"], "sliding_attention"),
    ],
)
def test_layer_types_without_interval(layer_types, message):
    with pytest.raises(ConfigError, match=message):
        read(layer_types=layer_types, full_attention_interval="absent")


def test_layer_types_need_no_pattern():
    layer_types = ["full_attention"] + ["linear_attention"] * 47
    config = read(layer_types=layer_types, full_attention_interval="absent")
    assert config.layer_types == tuple(layer_types)


def test_dense_model_needs_no_expert_sizes():
    config = read(num_experts=0, num_experts_per_tok="absent", moe_intermediate_size="absent")
    assert config.num_moe_layers == 0


def test_sparse_step_and_dense_layers_choose_the_experts():
    config = read(decoder_sparse_step=2, mlp_only_layers=[3])
    assert [i for i in range(8) if config.is_moe_layer(i)] == [1, 5, 7]


@pytest.mark.parametrize(
    ("tp_size", "heads"),
    [(0, None), (3, "linear_num_key_heads"), (32, "linear_num_key_heads")],
)
def test_tp_size_that_does_not_divide(tp_size, heads):
    with pytest.raises(ConfigError, match=f"tp_size = {tp_size}: .*{heads or 'at least 1'}"):
        read(tp_size=tp_size)


def test_tp_size_beside_key_value_heads():
    heads = {"num_attention_heads": 12, "linear_num_key_heads": 12, "linear_num_value_heads": 24}
    assert read(tp_size=6, num_key_value_heads=3, **heads).num_key_value_heads_per_rank == 1
    with pytest.raises(ConfigError, match=r"tp_size = 4: neither .* num_key_value_heads = 6"):
        read(tp_size=4, num_key_value_heads=6, **heads)


def test_more_stages_than_layers():
    with pytest.raises(ConfigError, match="pp_size = 49"):
        read(pp_size=49)


# properties ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    layers=st.integers(1, 96),
    interval=st.integers(1, 12),
)
def test_interval_and_layer_types_are_the_same_statement(layers, interval):
    derived = read(num_hidden_layers=layers, full_attention_interval=interval)
    assert derived.num_attention_layers == layers // interval
    written = read(
        num_hidden_layers=layers,
        layer_types=list(derived.layer_types),
        full_attention_interval="absent",
    )
    assert written == derived


@settings(deadline=None)
@given(
    key_heads=st.integers(1, 32),
    groups=st.integers(1, 4),
    tp_size=st.integers(1, 32),
    K=st.integers(1, 16).map(lambda n: 16 * n),
    V=st.integers(1, 16).map(lambda n: 16 * n),
)
def test_ranks_add_up_to_the_model_or_are_refused(key_heads, groups, tp_size, K, V):
    changes = {
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * groups,
        "linear_key_head_dim": K,
        "linear_value_head_dim": V,
        "num_attention_heads": 2 * tp_size,
        "num_key_value_heads": 1,
    }
    if key_heads % tp_size:
        with pytest.raises(ConfigError, match="tp_size"):
            read(tp_size=tp_size, **changes)
        return
    config = read(tp_size=tp_size, **changes)
    assert tp_size * config.conv_dim_per_rank == 2 * key_heads * K + key_heads * groups * V
    assert sum(output_sizes(config, "qkvz", "flat")) == 2 * config.key_dim + 2 * config.value_dim


@settings(deadline=None)
@given(
    st.sampled_from(sorted(RELEASED_80B)),
    st.one_of(
        st.none(), st.integers(-2, 3), st.floats(), st.text(max_size=3), st.booleans(), st.just([1])
    ),
)
def test_a_damaged_field_is_never_another_error(name, value):
    with contextlib.suppress(ConfigError):
        read(**{name: value})


# files and counts ---------------------------------------------------------------------------------


def test_read_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_80B))
    assert read_config(tmp_path) == RELEASED_80B
    assert read_config(str(tmp_path)) == RELEASED_80B


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json is missing"),
        ("", "cannot be read .* fetch it again"),
        (json.dumps(RELEASED_80B)[:200], "cannot be read .* truncated or damaged"),
        ("[]", "holds a list, not an object"),
        ("\udcff", "cannot be read"),
    ],
)
def test_read_config_complains(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=message):
        read_config(tmp_path)


def test_read_config_of_a_hub_name():
    with pytest.raises(ConfigError, match="not a folder; give a local checkpoint folder"):
        read_config("Qwen/Qwen3-Next-80B-A3B-Instruct")


@pytest.mark.parametrize("num_drafts", [1, 3, 8])
def test_served_draft_lengths(num_drafts):
    check_num_speculative_tokens(num_drafts)


@pytest.mark.parametrize("num_drafts", [0, -1, 9, 50, True, 1.0, "3", None])
@pytest.mark.parametrize("name", ["num_speculative_tokens", "--another-engines-flag"])
def test_refused_draft_lengths(num_drafts, name):
    with pytest.raises(ConfigError, match=rf"^{name} = .*ask for 1 to 8"):
        check_num_speculative_tokens(num_drafts, name)
