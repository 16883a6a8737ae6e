"""Damaged and hostile configs end in one ConfigError, which names file, field and fix."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sizes import CONFIGS
from checkpoints import BASE
from damage import damaged, little_memory
from qwen3next_plugin.config import (
    ConfigError,
    Qwen3NextConfig,
    check_before_engine,
    naming_file,
    read_config,
)
from qwen3next_plugin.config.json_files import MOST_BYTES, MOST_VALUES, read_object
from qwen3next_plugin.config.tokenizer import check_tokenizer
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import INDEX, read_index

QUANTISED = {"quant_method": "fp8", "weight_block_size": [128, 128], "producer": {"name": "x"}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000000,
    "partial_rotary_factor": 0.25,
    "factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DOCUMENTS = {
    "qwen3-next": BASE | {"quantization_config": QUANTISED},
    "qwen3-next_yarn": BASE | {"rope_scaling": YARN, "rope_theta": 10000000},
    "qwen3.6": json.loads((CONFIGS / "Qwen3.6-35B-A3B" / "config.json").read_text()),
    "qwen3.6_dense": json.loads((CONFIGS / "Qwen3.6-27B" / "config.json").read_text()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


def write(folder, document):
    (folder / "config.json").write_text(json.dumps(document))
    return folder


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_documents_are_whole(folder, name):
    Qwen3NextConfig.from_hf(read_config(write(folder, DOCUMENTS[name])))
    check_before_engine(folder)


def checks(document, folder):
    """What the command line does, what an engine does before it reads, and what it does after."""
    yield lambda: Qwen3NextConfig.from_hf(read_config(folder)).max_length
    yield lambda: check_before_engine(folder)
    if isinstance(document, dict):
        yield lambda: Qwen3NextConfig.from_hf(document).max_length


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from(sorted(DOCUMENTS)), data=st.data())
def test_whatever_a_config_holds_nothing_else_is_raised(folder, name, data):
    document = data.draw(damaged(DOCUMENTS[name]))
    write(folder, document)
    for check in checks(document, folder):
        with little_memory(), contextlib.suppress(ConfigError):
            check()


@settings(deadline=None)
@given(
    name=st.sampled_from(sorted(DOCUMENTS)),
    place=st.floats(0, 1, exclude_max=True),
    inserted=st.binary(max_size=3) | st.sampled_from([b"[" * 2000, b'{"a":' * 2000]),
    removed=st.integers(0, 3),
)
def test_whatever_bytes_a_config_has_nothing_else_is_raised(folder, name, place, inserted, removed):
    data = json.dumps(DOCUMENTS[name]).encode()
    at = int(place * len(data))
    (folder / "config.json").write_bytes(data[:at] + inserted + data[at + removed :])
    with little_memory(), contextlib.suppress(ConfigError):
        Qwen3NextConfig.from_hf(read_config(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "2048"}, "hidden_size = '2048': must be a whole number"),
        ({"hidden_size": -64}, "hidden_size = -64: must be a whole number of at least 1"),
        ({"hidden_size": 2**40}, f"hidden_size = {2**40}: must be at most 2147483647"),
        ({"hidden_size": True}, "hidden_size = True: must be a whole number"),
        ({"hidden_size": [64]}, r"hidden_size = \[64\]: must be a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers = 1000000000000: must be at most 1000"),
        ({"num_experts": 10**9}, "num_experts = 1000000000: must be at most 4096"),
        ({"max_position_embeddings": 10**9}, "max_position_embeddings = 1000000000: .* 16777216"),
        ({"full_attention_interval": "4"}, "full_attention_interval = '4': must be a whole"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps = 'small': must be a number"),
        ({"rope_theta": [1]}, r"rope_theta = \[1\]: must be a number"),
        ({"rope_scaling": []}, r"rope_scaling = \[\]: must be an object"),
        ({"rope_parameters": {"rope_theta": {}}}, r"rope_parameters\.rope_theta = {}: must be a"),
        ({"layer_types": "linear_attention"}, "layer_types = 'linear_attention': must be a list"),
        ({"architectures": "Qwen3NextForCausalLM"}, "architectures = .*: must be a list of texts"),
        ({"architectures": [["Qwen3NextForCausalLM"]]}, "architectures = .* must be a list of tex"),
        ({"model_type": 5}, "model_type = 5: must be a text"),
        ({"torch_dtype": 16}, "torch_dtype = 16: must be a text"),
        ({"text_config": "x"}, "text_config = 'x': must be an object"),
        ({"vision_config": []}, r"vision_config = \[\]: must be an object"),
        ({"quantization_config": ["fp8"]}, r"quantization_config = \['fp8'\]: must be an object"),
        ({"quantization_config": {"quant_method": 8}}, "quantization_config.quant_method = 8"),
        ({"mtp_num_hidden_layers": 2}, "mtp_num_hidden_layers = 2: .* one MTP layer; use the rel"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2: .* one MTP layer; use"),
    ],
    ids=str,
)
def test_file_field_and_fix_are_named_before_an_engine_reads(tmp_path, changes, message):
    path = re.escape(str(tmp_path / "config.json"))
    for check in (read_config, check_before_engine):
        with pytest.raises(ConfigError, match=f"^{path}: {message}"):
            check(write(tmp_path, BASE | changes))


@pytest.mark.parametrize("layers", [2, 3, 10**6])
@pytest.mark.parametrize("name", ["num_nextn_predict_layers", "mtp_num_hidden_layers"])
def test_two_mtp_layers_are_refused_whoever_reads_the_config(name, layers):
    with pytest.raises(ConfigError, match=f"= {layers}: the plugin drafts with one MTP layer"):
        Qwen3NextConfig.from_hf(BASE | {name: layers})


def test_experts_of_all_layers_are_bounded():
    with pytest.raises(ConfigError, match="num_experts = 4096: 4096000 in all layers"):
        Qwen3NextConfig.from_hf(BASE | {"num_experts": 4096, "num_hidden_layers": 1000})


def test_positions_that_yarn_covers_are_bounded():
    yarn = YARN | {"factor": 4096.0}
    with pytest.raises(ConfigError, match=r"factor = 4096\.0: times original.* 16777216"):
        Qwen3NextConfig.from_hf(BASE | {"rope_scaling": yarn, "rope_theta": 10000000})


def test_an_error_shows_the_beginning_of_a_long_value(tmp_path):
    with pytest.raises(ConfigError) as raised:
        read_config(write(tmp_path, BASE | {"hidden_size": "x" * 10**6}))
    assert len(str(raised.value)) < 500


# files of any size --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 10**6, "cannot be read"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "more than 50 levels"),
        (b"[" + b"[]," * MOST_VALUES + b"1]", f"more than {MOST_VALUES} values"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"a": "\xff"}', "cannot be read"),
        (b'"text"', "holds a str, not an object"),
    ],
    ids=["open", "deep", "many", "digits", "no text", "no object"],
)
def test_hostile_json_takes_little_memory(tmp_path, data, message):
    path = tmp_path / "some.json"
    path.write_bytes(data)
    with little_memory(), pytest.raises(ConfigError, match=rf"some\.json .*{message}"):
        read_object(path, ConfigError)


@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        ({}, 0),
        ({"model": {"vocab": {"a": 0, "b": 7}}}, 8),
        ({"model": {"vocab": {"a": 0, "b": "7"}}, "added_tokens": [5, {"id": "9"}]}, 1),
        ({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}, 2),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 9, "content": "x"}]}, 10),
        ({"model": [], "added_tokens": {"id": 5}}, 0),
    ],
    ids=str,
)
def test_a_tokenizer_has_no_more_tokens_than_the_embedding(tmp_path, raw, tokens):
    check_tokenizer(tmp_path, 1, "--tokenizer")  # there is none
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    check_tokenizer(tmp_path, max(1, tokens), "--tokenizer")
    if tokens > 1:
        with pytest.raises(ConfigError, match=f"has {tokens} tokens, .* has {tokens - 1}; fetch"):
            check_tokenizer(tmp_path, tokens - 1, "--tokenizer")


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "some.json"
    with path.open("wb") as file:
        file.truncate(100 * MOST_BYTES)
    with little_memory(), pytest.raises(ConfigError, match=f"{100 * MOST_BYTES} bytes"):
        read_object(path, ConfigError)


# beside an engine's reader ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{", "5"])
def test_files_that_only_engines_read_hold_objects(tmp_path, name, text):
    write(tmp_path, BASE)
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=re.escape(name)):
        check_before_engine(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", INDEX])
def test_a_pipe_is_refused_and_not_read(tmp_path, name):
    """An engine that opens one waits for a writer."""
    write(tmp_path, BASE)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is no file, and whoever reads it may wait"):
        check_before_engine(tmp_path)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read \(it is no regular file\)"):
        read_object(tmp_path / name, ConfigError)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_index_is_a_file(tmp_path, make):
    make(tmp_path / INDEX)
    with pytest.raises(CheckpointError, match=f"{INDEX} cannot be read"):
        read_index(tmp_path)


def test_a_path_that_safetensors_cannot_open_is_named(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    write(folder, BASE)
    for check in (read_config, check_before_engine):
        with pytest.raises(ConfigError, match=r"udcff': the path is not UTF-8, and .*; rename"):
            check(folder)


def test_other_models_pass(tmp_path):
    """An engine may read them otherwise."""
    other = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "2048"}
    check_before_engine(write(tmp_path, other))
    (tmp_path / "generation_config.json").write_text("[]")
    check_before_engine(tmp_path)
    with pytest.raises(KeyError, match="theirs"), naming_file(tmp_path, "vLLM", "--flag"):
        raise KeyError("theirs")


def test_a_folder_without_config_and_a_hub_name_pass(tmp_path):
    check_before_engine(tmp_path)
    check_before_engine("Qwen/Qwen3-Next-80B-A3B-Instruct")


def test_an_engines_own_error_names_the_file(tmp_path):
    message = r"config\.json: vLLM cannot read it \(AttributeError: no dtype x\); .* correct --flag"
    with (
        pytest.raises(ConfigError, match=message),
        naming_file(write(tmp_path, BASE), "vLLM", "--flag"),
    ):
        raise AttributeError("no dtype\n x")
