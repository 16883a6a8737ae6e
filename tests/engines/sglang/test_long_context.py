"""YaRN under SGLang: however it is asked for, trunk and drafter have the same RoPE and length."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.long_context import (
    CASES,
    LINEAR_LAYERS,
    ORIGINAL,
    REACH,
    YARN,
    Gauge,
    ask,
    check_read,
    planned,
    with_yarn,
    write_layouts,
    write_small,
)
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.pools import Pools

LONG = {"rope_scaling": YARN}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    return write_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.fixture(scope="module", autouse=True)
def environment():
    """SGLang hands some flags on in environment variables: no later test's server may see them."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(scope="module")
def configs(environment):
    """The configs that SGLang makes of its flags, for the trunk or the drafter."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.configs.model_config import ModelConfig

    def make(model: Path, overrides=(), *, drafter=False, images=False, context_length=None):
        return ModelConfig(
            model_path=str(model),
            model_override_args=json.dumps(dict(overrides)),
            context_length=context_length,
            is_draft_model=drafter,
            language_model_only=not images,
            dtype="float32",
        )

    return make


@pytest.mark.parametrize(("layout", "way"), CASES)
def test_trunk_and_drafter_read_the_same(layouts, tmp_path, configs, layout, way):
    model, overrides = ask(layouts[layout], way, tmp_path)
    for drafter in (False, True):
        found = configs(model, overrides, drafter=drafter)
        check_read(found.hf_config, layouts[layout], tmp_path / str(drafter))
        assert found.context_len == REACH
        assert configs(model, overrides, drafter=drafter, context_length=REACH)


def test_another_override_beside_it_is_kept(layouts, configs):
    found = configs(layouts["text"], LONG | {"rms_norm_eps": 1e-5})
    assert found.hf_config.rms_norm_eps == 1e-5
    assert configs(layouts["text"]).context_len == ORIGINAL  # the one SGLang keeps is unchanged


def test_images_keep_their_sections(layouts, configs):
    for overrides in (LONG, {"text_config": {"rope_parameters": YARN}}):
        found = configs(layouts["wrapped"], overrides, images=True)
        assert found.model_is_mrope
        assert found.hf_text_config.rope_parameters["mrope_section"]


@pytest.mark.parametrize(
    ("overrides", "length", "message"),
    [
        ({}, ORIGINAL + 1, r"--context-length 513 is beyond .* --json-model-override-args '{"),
        (LONG, REACH + 1, r"2049 is beyond the 2048 positions that YaRN covers"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, None, r"factor = 0\.5: YaRN needs"),
        ({"rope_scaling": YARN | {"rope_theta": None}}, None, "has lost rope_theta"),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                "max_position_embeddings": REACH,
            },
            None,
            "has lost original_max_position_embeddings",
        ),
        (LONG | {"rope_parameters": YARN}, None, "are both overridden"),
    ],
    ids=str,
)
@pytest.mark.parametrize("allowed", ["0", "1"])
def test_flags_are_refused_by_name(
    monkeypatch, layouts, configs, allowed, overrides, length, message
):
    """Also with SGLang's variable: beyond RoPE's table there is no position to give a token."""
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", allowed)
    with pytest.raises(ConfigError, match=message):
        configs(layouts["qwen3-next"], overrides, context_length=length)


def test_the_fix_of_a_length_is_one(layouts, configs):
    with pytest.raises(ConfigError) as raised:
        configs(layouts["wrapped"], context_length=REACH)
    said = json.loads(str(raised.value).partition("--json-model-override-args '")[2].rstrip("'"))
    assert configs(layouts["wrapped"], said, context_length=REACH).context_len == REACH


@pytest.mark.compat
def test_sglang_still_ignores_the_factor(layouts, tmp_path):
    """When it does not, a patch can go."""
    from sglang.srt.utils.hf_transformers_utils import get_config, get_context_length

    model, _ = ask(layouts["text"], "file", tmp_path)
    assert get_context_length(get_config(str(model), trust_remote_code=False)) == ORIGINAL


# served -----------------------------------------------------------------------------------------


def serve(folder: Path, original: int, tokens: int, *flags: str, dtype: str = "float32") -> Server:
    """A server with YaRN by an override, of so many tokens."""
    yarn = {"rope_scaling": YARN | {"original_max_position_embeddings": original}}
    flags += ("--json-model-override-args", json.dumps(yarn), "--context-length", str(tokens))
    flags += ("--dtype", dtype, "--max-total-tokens", str(tokens + 64), "--enable-metrics")
    return Forked(folder, *flags, "--max-mamba-cache-size", "8", env=FIXED).wait()


@pytest.mark.serve
@pytest.mark.long
@pytest.mark.parametrize("drafts", [0, 2])
def test_32k_tokens_are_transformers(tmp_path, reference, drafts):
    folder, prompt = write_small(tmp_path / "model", 8192), random_prompt(32_700)
    server = serve(folder, 8192, 32_768, *((*NEXTN, str(drafts)) if drafts else ()))
    try:
        answers = server.greedy([prompt], 32, return_logprob=True, logprob_start_len=0)
    finally:
        server.close()
    yarn = YARN | {"original_max_position_embeddings": 8192}
    check_greedy(reference(with_yarn(folder, tmp_path / "yarn", yarn)), [prompt], answers)


@pytest.mark.serve
@pytest.mark.long
@pytest.mark.parametrize(("tokens", "dtype"), [(65_536, "float32"), (262_144, "bfloat16")])
def test_long_prompts_over_http(tmp_path, reference, tokens, dtype):
    """One page in each linear layer, KV as planned; in fp32 what transformers computes.

    The longest native prompt is read in bf16, because attention in fp32 takes long here.
    """
    answer, drafts = 32, 2  # long enough that the gauge sees the whole prompt
    pages, usage = "sglang:qwen3next_state_pages", "sglang:num_used_tokens"
    folder, prompt = write_small(tmp_path / "model", tokens), random_prompt(tokens)
    server = serve(folder, tokens, tokens + 64, *NEXTN, str(drafts), dtype=dtype)
    try:
        with Gauge(server, pages, usage) as gauge:
            answers = server.greedy([prompt], answer, return_logprob=True)
        memory = server.metrics()
    finally:
        server.close()
    assert [len(found.token_ids) for found in answers] == [answer]
    assert all(-20 < logprob <= 0 for logprob in answers[0].logprobs)  # no NaN, nothing absurd
    assert set(gauge.seen[pages]) <= {0, LINEAR_LAYERS}
    plan = planned(Pools, folder, tokens, drafts, dtype)
    pool = memory["sglang:kv_cache_memory_usage_gb"] * 2**30  # without the drafter's layer
    used = pool * max(gauge.seen[usage]) / memory["sglang:max_total_num_tokens"]
    assert plan.attention_layers == 2
    assert used == pytest.approx(plan.kv_bytes_per_layer * tokens, rel=0.02)
    if dtype == "float32":
        yarn = YARN | {"original_max_position_embeddings": tokens}
        check_greedy(reference(with_yarn(folder, tmp_path / "yarn", yarn)), [prompt], answers)
