"""YaRN under vLLM: however it is asked for, trunk and drafter have the same RoPE and length."""

import json
from pathlib import Path

import pytest
import torch
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

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
    at_needles,
    check_read,
    needle_prompt,
    planned,
    with_yarn,
    write_layouts,
    write_small,
)
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from engines.vllm.server import Forked
from qwen3next_plugin.engines.vllm.blocks import Blocks

RELEASED = Path(__file__).parents[3] / "examples" / "configs"
DRAFTS = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory) -> dict[str, Path]:
    return write_layouts(tmp_path_factory.mktemp("layouts"))


def complete(model: Path, **flags):
    """vLLM completes its configuration, as it does before it starts a worker."""
    flags = {"dtype": "float32", "enforce_eager": True, "language_model_only": True} | flags
    return EngineArgs(model=str(model), **flags).create_engine_config()


def parse(*command: str) -> EngineArgs:
    """What `vllm serve` makes of a command line."""
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(command)
    args.model = args.model_tag  # as `vllm serve` has it before its command is run
    return AsyncEngineArgs.from_cli_args(args)


# every way works --------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "way"), CASES)
def test_trunk_and_drafter_read_the_same(layouts, tmp_path, layout, way):
    model, overrides = ask(layouts[layout], way, tmp_path)
    found = complete(model, hf_overrides=overrides, speculative_config=DRAFTS)
    for i, part in enumerate((found.model_config, found.speculative_config.draft_model_config)):
        check_read(part.hf_config, layouts[layout], tmp_path / str(i))
        assert part.max_model_len == REACH


@pytest.mark.parametrize("name", ["Qwen3-Next-80B-A3B", "Qwen3.6-35B-A3B"])
def test_qwens_command_word_for_word(name):
    yarn = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":262144}'
    flags = ("--rope-scaling", yarn, "--max-model-len", "1010000")
    args = parse(str(RELEASED / name), *flags, "--skip-tokenizer-init", "--language-model-only")
    assert type(args) is AsyncEngineArgs
    found = args.create_model_config()
    rope = found.hf_text_config.rope_parameters
    assert found.max_model_len == 1010000
    assert rope.items() >= json.loads(yarn).items()
    assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (10_000_000, 0.25)
    assert rope.get("mrope_section") == ([11, 11, 10] if name == "Qwen3.6-35B-A3B" else None)


def test_the_flag_beside_other_overrides(layouts):
    flags = ("--hf-overrides.vocab_size", "512", "--rope-scaling.factor", "4.0")
    args = parse(str(layouts["qwen3-next"]), *flags, "--rope-scaling.rope_type", "yarn")
    assert args.hf_overrides == {
        "vocab_size": 512,
        "rope_scaling": {"factor": 4.0, "rope_type": "yarn"},
    }
    assert parse(str(layouts["qwen3-next"])).hf_overrides == {}


def test_drafts_may_end_earlier(layouts):
    drafts = DRAFTS | {"max_model_len": 300}
    model = layouts["text"]
    found = complete(model, hf_overrides={"rope_scaling": YARN}, speculative_config=drafts)
    assert found.speculative_config.draft_model_config.max_model_len == 300


# what does not is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_model_len": ORIGINAL + 1}, "--max-model-len 513 is beyond .* --rope-scaling '{"),
        (
            {"hf_overrides": {"rope_scaling": YARN}, "max_model_len": REACH + 1},
            r"2049 is beyond the 2048 positions that YaRN covers .* a factor of at least 4\.5",
        ),
        ({"hf_overrides": {"rope_scaling": YARN | {"factor": 0.5}}}, r"factor = 0\.5: YaRN needs"),
        ({"hf_overrides": {"rope_scaling": YARN | {"rope_theta": None}}}, "has lost rope_theta"),
        (
            {
                "hf_overrides": {
                    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
                    "max_position_embeddings": REACH,
                }
            },
            "has lost original_max_position_embeddings",
        ),
        (
            {"speculative_config": DRAFTS | {"max_model_len": 600}},
            "max_model_len of --speculative-config 600 is beyond",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("allowed", ["0", "1"])
def test_flags_are_refused_by_name(monkeypatch, layouts, allowed, flags, message):
    """Also with vLLM's variable: beyond RoPE's table there is no position to give a token."""
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", allowed)
    with pytest.raises(Exception, match=message):
        complete(layouts["qwen3-next"], **flags)


def test_both_flags_are_refused(layouts):
    flags = ("--rope-scaling", json.dumps(YARN), "--hf-overrides", '{"rope_parameters": {}}')
    with pytest.raises(ValueError, match="--rope-scaling: --hf-overrides has RoPE, too"):
        parse(str(layouts["text"]), *flags)


def test_a_flag_that_is_no_object_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse("a-model", "--rope-scaling", "yarn")
    assert "--rope-scaling yarn: this is no JSON object; write it as" in capsys.readouterr().err


def test_images_need_their_sections(layouts, tmp_path):
    model, _ = ask(layouts["wrapped"], "file", tmp_path)
    raw = json.loads((model / "config.json").read_text())
    for name in ("mrope_section", "mrope_interleaved"):
        raw["text_config"]["rope_parameters"].pop(name)
    (model / "config.json").write_text(json.dumps(raw))
    complete(model)
    with pytest.raises(Exception, match=r"lost mrope_section: .* --language-model-only"):
        complete(model, language_model_only=False)


@pytest.mark.compat
def test_vllm_still_ignores_the_factor(layouts, tmp_path):
    """When it does not, two patches can go."""
    from vllm.transformers_utils.config import get_config

    found = get_config(ask(layouts["text"], "file", tmp_path)[0], trust_remote_code=False)
    assert found.max_position_embeddings == ORIGINAL


# served -----------------------------------------------------------------------------------------


@pytest.mark.serve
@pytest.mark.long
def test_32k_tokens_are_transformers(tmp_path, reference):
    """With and without drafts, by an override, which must reach the drafter, too."""
    model, prompt = write_small(tmp_path / "model", 8192), random_prompt(32_700)
    yarn = YARN | {"original_max_position_embeddings": 8192}
    engine = Offline(
        model,
        dtype="float32",
        max_num_batched_tokens=4096,
        hf_overrides={"rope_scaling": yarn},
        speculative_config=DRAFTS,
    )
    try:
        for num_drafts in (0, 2):
            engine.forget()
            engine.inside("draft", num_drafts)
            outputs = engine.greedy([prompt], 32, **LOGPROBS)
            check_greedy(
                reference(with_yarn(model, tmp_path / str(num_drafts), yarn)), [prompt], outputs
            )
    finally:
        engine.close()


@pytest.mark.serve
@pytest.mark.long
def test_the_longest_native_prompt_over_http(tmp_path, reference):
    """Two pages in each linear layer at most, KV as planned, and what transformers computes.

    Also of tokens that stand at three depths and again at the end.
    """
    tokens, answer, pages = 262_144, 8, "vllm:qwen3next_state_pages"
    folder, usage = write_small(tmp_path / "model", tokens), "vllm:kv_cache_usage_perc"
    yarn = YARN | {"original_max_position_embeddings": tokens}
    flags = ("--rope-scaling", json.dumps(yarn), "--max-model-len", str(tokens + 64))
    small = ("--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30))
    server = Forked(folder, *flags, *small, "--speculative-config", json.dumps(DRAFTS)).wait()
    prompt = needle_prompt(tokens)
    asked = {"return_token_ids": True, "ignore_eos": True, "prompt_logprobs": 0}
    try:
        (blocks,) = server.by_label("vllm:cache_config_info", "num_gpu_blocks")
        with Gauge(server, pages, usage) as gauge:
            (choice,) = server.client.completions.create(
                model=server.model, prompt=list(prompt), max_tokens=answer, temperature=0,
                logprobs=1, extra_body=asked,
            ).choices  # fmt: skip
    finally:
        server.close()
    assert set(gauge.seen[pages]) <= {0, LINEAR_LAYERS, 2 * LINEAR_LAYERS}
    plan = planned(Blocks, folder, tokens, DRAFTS["num_speculative_tokens"])
    used = max(gauge.seen[usage]) * (int(blocks) - 1)  # less the null block
    assert used == pytest.approx(plan.blocks_per_request, rel=0.02)
    assert len(choice.token_ids) == answer
    likeliest, logprobs = reference(with_yarn(folder, tmp_path / "yarn", yarn)).greedy_logprobs(
        prompt + tuple(choice.token_ids)
    )
    assert tuple(choice.token_ids) == likeliest[-answer:]
    assert choice.logprobs.token_logprobs == pytest.approx(logprobs[-answer:].tolist(), abs=1e-3)
    entries = zip(prompt[1:], choice.prompt_logprobs[1:], strict=True)
    found = at_needles([entry[str(token)]["logprob"] for token, entry in entries])
    torch.testing.assert_close(found, at_needles(logprobs[:-answer]), atol=1e-3, rtol=0)
