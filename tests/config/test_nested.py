"""Configs of Qwen3.5 and later: the text model's fields nested, or alone."""

import copy

import pytest

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, read_config
from released import RELEASED_80B, read

ROPE_35 = {
    "rope_type": "default",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
    "mrope_interleaved": True,
    "mrope_section": [11, 11, 10],
}
NOT_IN_35 = ("rope_theta", "partial_rotary_factor", "rope_scaling", "decoder_sparse_step")
TEXT_35 = {name: value for name, value in RELEASED_80B.items() if name not in NOT_IN_35} | {
    "model_type": "qwen3_5_moe_text",
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "rope_parameters": ROPE_35,
    "vocab_size": 248320,
}
WRAPPED_35 = {
    "model_type": "qwen3_5_moe",
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "text_config": TEXT_35,
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": "qwen3_5_moe"},
}
DENSE_35 = {
    name: value
    for name, value in TEXT_35.items()
    if "expert" not in name and not name.startswith("moe")
} | {"model_type": "qwen3_5_text", "intermediate_size": 17408}


def nested(outer=None, **inner):
    """The config of a model with a vision tower, changed at both levels."""
    text = {key: value for key, value in (TEXT_35 | inner).items() if value != "absent"}
    return Qwen3NextConfig.from_hf(WRAPPED_35 | {"text_config": text} | (outer or {}))


def test_nested_and_flat_read_the_same():
    config = Qwen3NextConfig.from_hf(TEXT_35)
    assert config == nested()
    assert config.layout == "flat"
    assert read().layout == "grouped"
    assert (config.num_moe_layers, config.num_linear_layers) == (40, 30)
    assert config.mrope_section == (11, 11, 10)
    assert read().mrope_section == ()
    assert hash(config) == hash(nested())


def test_dense_models_have_no_experts():
    config = Qwen3NextConfig.from_hf(DENSE_35)
    assert (config.num_experts, config.num_moe_layers, config.intermediate_size) == (0, 0, 17408)


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("Qwen3_5MoeTextConfig", TEXT_35),
        ("Qwen3_5TextConfig", DENSE_35),
        ("Qwen3_5MoeConfig", WRAPPED_35),
    ],
)
def test_transformers_config_of_the_family_agrees(tmp_path, name, raw):
    import transformers

    theirs = getattr(transformers, name)(**copy.deepcopy(raw))
    assert Qwen3NextConfig.from_hf(theirs) == Qwen3NextConfig.from_hf(raw)
    theirs.save_pretrained(tmp_path)
    assert Qwen3NextConfig.from_hf(read_config(tmp_path)) == Qwen3NextConfig.from_hf(raw)


@pytest.mark.parametrize("layers", [0, 1])
def test_mtp_layers_stand_at_either_level(layers):
    inside = nested(mtp_num_hidden_layers=layers)
    outside = nested({"mtp_num_hidden_layers": layers}, mtp_num_hidden_layers="absent")
    assert inside == outside
    assert inside.num_nextn_predict_layers == layers
    assert nested(mtp_num_hidden_layers="absent").num_nextn_predict_layers == 1


def test_embeddings_are_tied_if_either_level_says_so():
    assert nested({"tie_word_embeddings": True}).tie_word_embeddings
    assert nested(tie_word_embeddings=True).tie_word_embeddings
    assert not nested().tie_word_embeddings


def test_copies_of_vllms_drafter_are_read():
    assert nested({"model_type": "qwen3_5_mtp"}) == nested()
    assert Qwen3NextConfig.from_hf(DENSE_35 | {"model_type": "qwen3_5_mtp"}).num_experts == 0
    assert Qwen3NextConfig.from_hf(TEXT_35 | {"model_type": "qwen3_5_mtp"}).num_experts == 256


@pytest.mark.parametrize(
    ("outer", "inner", "message"),
    [
        ({"text_config": 3}, {}, "text_config = 3: must be an object"),
        ({"model_type": "qwen4_exp"}, {}, "text_config.model_type = 'qwen3_5_moe_text'"),
        ({"model_type": "qwen3_5"}, {}, "model_type is 'qwen3_5'; use one layout"),
        ({"hidden_size": 1024}, {}, "hidden_size = 1024: text_config says 2048"),
        ({"rope_theta": 5e6}, {}, "rope_theta = 5000000.0: text_config says None"),
        ({"tie_word_embeddings": "no"}, {}, "tie_word_embeddings = 'no'"),
        ({}, {"model_type": "qwen3_5_moe", "num_experts": "absent"}, "num_experts is missing"),
        ({}, {"attn_output_gate": False}, "attn_output_gate = False"),
        ({}, {"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings = True"),
        ({}, {"layer_types": ["sliding_attention"] * 40}, "disagrees with layer_types"),
        ({}, {"rope_parameters": ROPE_35 | {"mrope_section": [11, 11, 11]}}, "mrope_section"),
        (
            {},
            {"rope_parameters": ROPE_35 | {"mrope_section": 32}},
            "mrope_section = 32: must be a list",
        ),
        ({}, {"rope_parameters": ROPE_35 | {"mrope_interleaved": None}}, "mrope_interleaved"),
    ],
)
def test_error_of_a_nested_config(outer, inner, message):
    with pytest.raises(ConfigError, match=message):
        nested(outer, **inner)


def test_dense_type_with_experts_is_a_mix():
    with pytest.raises(ConfigError, match="num_experts = 256: 'qwen3_5_text' has dense layers"):
        Qwen3NextConfig.from_hf(TEXT_35 | {"model_type": "qwen3_5_text"})
