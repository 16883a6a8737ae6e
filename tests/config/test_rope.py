"""RoPE of a config: overrides of it, the positions it covers, and what is refused."""

import json
from types import SimpleNamespace as Bag

import pytest

from needs import need
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig, host_rope, rope
from released import RELEASED_80B, read

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}
OF_ROPE = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
SECTIONS = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
OLD = {"max_position_embeddings": 262144, "rope_scaling": None} | OF_ROPE
NEW = {
    "max_position_embeddings": 262144,
    "rope_parameters": {"rope_type": "default"} | OF_ROPE | SECTIONS,
}


# overrides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("nested", [False, True])
def test_an_override_is_found_at_either_level(name, nested):
    given = {"text_config": {name: YARN, "head_dim": 64}} if nested else {name: YARN, "a": {}}
    rest, found = host_rope.split(given)
    assert found == YARN
    assert rest == ({"text_config": {"head_dim": 64}} if nested else {"a": {}})
    assert (given["text_config"] if nested else given)[name] is YARN  # the argument is untouched


def test_no_override():
    assert host_rope.split({"text_config": {"head_dim": 64}}) == (
        {"text_config": {"head_dim": 64}},
        None,
    )


def test_two_overrides_are_refused():
    with pytest.raises(ConfigError, match="rope_scaling and rope_parameters are both overridden"):
        host_rope.split({"rope_scaling": YARN, "text_config": {"rope_parameters": YARN}})


@pytest.mark.parametrize(("raw", "kept"), [(OLD, {}), (NEW, SECTIONS)], ids=["old", "new"])
@pytest.mark.parametrize("given", [YARN, {"type": "yarn", "factor": 4.0}], ids=["full", "short"])
def test_what_an_override_leaves_out_stays(raw, kept, given):
    assert host_rope.merge(raw, given, resized=False) == YARN | OF_ROPE | kept


def test_an_override_of_one_number_leaves_the_others_of_yarn():
    raw = NEW | {"rope_parameters": YARN | OF_ROPE | SECTIONS}
    assert host_rope.merge(raw, {"factor": 2.0}, resized=False) == raw["rope_parameters"] | {
        "factor": 2.0
    }


def test_an_override_that_ends_yarn_leaves_none_of_it():
    raw = NEW | {"rope_parameters": YARN | OF_ROPE}
    merged = host_rope.merge(raw, {"rope_type": "default"}, resized=False)
    assert merged == OF_ROPE | {"rope_type": "default"}


def test_the_original_length_is_not_taken_from_an_overridden_one():
    with pytest.raises(ConfigError, match=r"lost original_max_position_embeddings: .* add it"):
        host_rope.merge(OLD, {"rope_type": "yarn", "factor": 4.0}, resized=True)
    assert host_rope.merge(OLD, YARN, resized=True)["original_max_position_embeddings"] == 262144


def test_the_top_level_follows():
    config = Bag(**OLD)
    host_rope.override(config, YARN | {"rope_theta": 5e6}, {})
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 5e6


# how far it reaches -----------------------------------------------------------------------------


def extended(asked=None, **fields):
    config = Bag(**(OLD | {"rope_parameters": None} | fields))
    names = {"flag": "--length", "extend": "--yarn '%s'", "override_flag": "--set"}
    host_rope.extend(config, asked, **names)
    return config


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({}, 262144),
        ({"rope_scaling": YARN}, 1048576),
        ({"rope_parameters": YARN | OF_ROPE}, 1048576),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 1048576),
        ({"rope_scaling": YARN, "max_position_embeddings": 1010000}, 1048576),
        ({"rope_scaling": YARN | {"factor": 1.5}, "max_position_embeddings": 524288}, 393216),
        ({"rope_scaling": YARN | {"factor": 1}}, 262144),
    ],
    ids=str,
)
def test_length_is_the_original_times_the_factor(fields, length):
    assert extended(length, **fields).max_position_embeddings == length
    with pytest.raises(ConfigError, match=f"--length {length + 1} is beyond .* {length} positions"):
        extended(length + 1, **fields)


def test_extending_again_changes_nothing():
    config = extended(rope_parameters=YARN | OF_ROPE)
    before = dict(vars(config))
    host_rope.extend(config, 1010000, flag="", extend="", override_flag="")
    assert vars(config) == before


def test_a_length_beyond_shows_what_covers_it():
    with pytest.raises(ConfigError, match=r"or serve with a factor of at least 5\.5"):
        extended(1_400_000, rope_scaling=YARN)
    with pytest.raises(ConfigError) as raised:
        extended(1_010_000)
    said = str(raised.value).partition("--yarn '")[2].rstrip("'")
    assert host_rope.parse(said, "--yarn") == YARN
    extended(1_010_000, rope_scaling=host_rope.parse(said, "--yarn"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 0.5}, r"rope_parameters\.factor = 0\.5: YaRN needs one of at least 1"),
        ({"factor": None}, r"rope_parameters\.factor = None"),
        ({"factor": float("nan")}, r"rope_parameters\.factor = nan"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings = None"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings = 0"),
        ({"rope_type": "linear"}, "rope_type = 'linear': use 'default' or 'yarn'"),
        ({"rope_type": "default"}, r"rope_parameters\.factor = 4\.0: rope_type is default"),
        ({"attn_factor": 1.0}, r"attn_factor = 1\.0: it would be ignored; YaRN has factor, "),
        ({"beta_fast": 0}, r"beta_fast = 0: must be positive"),
        ({"attention_factor": "1"}, "attention_factor = '1': must be positive"),
        ({"truncate": 1}, "truncate = 1: must be true or false"),
    ],
    ids=str,
)
def test_yarn_that_cannot_be_computed_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        extended(rope_scaling=YARN | changes)


@pytest.mark.parametrize("name", OF_ROPE)
def test_a_lost_field_is_named(name):
    fields = dict.fromkeys(OF_ROPE) | {"rope_parameters": YARN | OF_ROPE | {name: None}}
    with pytest.raises(ConfigError, match=f"has lost {name}: .* --set '{{"):
        extended(**fields)


def test_two_spellings_that_differ_are_refused():
    with pytest.raises(ConfigError, match=r"rope_scaling = .* write all fields in"):
        extended(rope_scaling=YARN, rope_parameters=NEW["rope_parameters"])


def test_images_need_their_sections():
    rope.check_images(YARN | SECTIONS, "--text")
    rope.check_images({"rope_type": "default"}, "--text")
    with pytest.raises(ConfigError, match=r"lost mrope_section: .* or add --text"):
        rope.check_images(YARN, "--text")


@pytest.mark.parametrize("text", ["yarn", "[]", "{'factor': 4}"])
def test_a_flag_that_is_no_object_is_shown_one(text):
    with pytest.raises(ConfigError, match=r"--yarn .*: this is no JSON object; write it as '\{"):
        host_rope.parse(text, "--yarn")


def test_yarn_in_the_file_keeps_the_top_level_values():
    config = read(rope_scaling={"type": "yarn", "factor": 4.0})
    assert config.rope_parameters == YARN | {"rope_theta": 1e7, "partial_rotary_factor": 0.25}


@pytest.mark.parametrize("lost", ["rope_theta", "partial_rotary_factor"])
def test_yarn_that_lost_a_value_is_told_all_of_it(lost):
    rope = YARN | {"rope_theta": 1e7, "partial_rotary_factor": 0.25, lost: None}
    changes = {"rope_theta": None, "partial_rotary_factor": None, "rope_parameters": rope}
    with pytest.raises(ConfigError, match=f"rope_parameters has lost {lost}") as raised:
        Qwen3NextConfig.from_hf(RELEASED_80B | changes, override_flag="--set")
    fix = json.loads(str(raised.value).partition(": --set '")[2].rstrip("'"))
    assert fix["rope_parameters"] == YARN | {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    assert read(**(changes | fix)).rotary_dim == 64


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_vllm_override_of_a_part_of_rope_is_caught(tmp_path, name):
    need("vllm")
    from vllm.transformers_utils.config import get_config

    (tmp_path / "config.json").write_text(json.dumps(RELEASED_80B))

    def under(overrides):
        return Qwen3NextConfig.from_hf(
            get_config(tmp_path, trust_remote_code=False, hf_overrides_kw=overrides)
        )

    with pytest.raises(ConfigError, match="rope_parameters has lost rope_theta"):
        under({name: dict(YARN)})
    whole = YARN | {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
    assert under({"rope_parameters": dict(whole)}).rope_parameters == whole
    with pytest.raises(ConfigError, match=r"rope_theta = 5000000.0: .* override rope_parameters"):
        under({"rope_theta": 5e6})
