"""Served by vLLM in fp32, the model computes what transformers computes, under every flag."""

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_prompt, write_checkpoint
from engines.checks import LENGTHS, TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS, check_cache_hits, check_sampled
from engines.vllm.offline import Offline
from tiers import long_except

pytestmark = pytest.mark.serve

PROMPTS = [random_prompt(length) for length in LENGTHS]


def mtp(num_drafts: int) -> dict[str, Any]:
    """Flags of speculation with k draft tokens."""
    return {
        "speculative_config": {"method": "qwen3_next_mtp", "num_speculative_tokens": num_drafts}
    }


ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mtp-1_chunks-of-257": mtp(1) | {"max_num_batched_tokens": 257, "max_num_seqs": 16},
    "mtp-2_compiled": mtp(2) | {"enforce_eager": False},
    "mtp-3": mtp(3),
    "mtp-4_chunks-of-67_no-cache": mtp(4)
    | {"max_num_batched_tokens": 67, "max_num_seqs": 8, "enable_prefix_caching": False},
}
# The other one with --long: test_three_engines.py and test_server.py compile, too.
ALWAYS = [name for name in ENGINES if name != "mtp-2_compiled"]


def engines_with(flag: str, default: object = None) -> pytest.MarkDecorator:
    """Run a test on the engines that have the flag."""
    names = [name for name, flags in ENGINES.items() if flags.get(flag, default)]
    cases = long_except(ALWAYS, names)
    return pytest.mark.parametrize("name", cases, indirect=True, scope="module")


@pytest.fixture(scope="module", params=long_except(ALWAYS, ENGINES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(name, checkpoint, tmp_path_factory, size) -> Path:
    """The checkpoint; for a compiler, which takes a while for each layer, one of every kind."""
    if ENGINES[name].get("enforce_eager", True):
        return checkpoint
    return write_checkpoint(tmp_path_factory.mktemp("compiled"), num_hidden_layers=size(4, 8))


@pytest.fixture(scope="module")
def engine(name, folder) -> Iterator[Offline]:
    flags = {"dtype": "float32", "max_model_len": 8192} | ENGINES[name]
    engine = Offline(folder, env={"QWEN3NEXT_DRAFTS": "fixed"}, **flags)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model(folder, reference):
    return reference(folder)


def test_each_prompt_alone(engine, model):
    outputs = [engine.greedy([prompt], TOKENS, **LOGPROBS)[0] for prompt in PROMPTS]
    check_greedy(model, PROMPTS, outputs)


def test_all_prompts_in_one_batch(engine, model):
    check_greedy(model, PROMPTS, engine.greedy(PROMPTS, TOKENS, **LOGPROBS))


@engines_with("enable_prefix_caching", default=True)
def test_prefix_cache_hits(engine, model):
    block = engine.cache()["block_size"]
    prompts = [random_prompt(n, seed=1) for n in (2 * block, 2 * block + 1, 3 * block + 50, 1000)]
    warm = check_cache_hits(engine, prompts)
    check_greedy(model, prompts, warm)


@engines_with("enable_prefix_caching", default=True)
def test_shared_prefix_of_other_prompts(engine, model):
    block = engine.cache()["block_size"]
    prompts = [
        random_prompt(2 * block, seed=2) + random_prompt(n, seed=3) for n in (1, 2, 70, block)
    ]
    engine.forget()
    outputs = [engine.greedy([prompt], TOKENS, logprobs=0)[0] for prompt in prompts]
    assert min(output.cached for output in outputs[1:]) > 0
    check_greedy(model, prompts, outputs)


@engines_with("speculative_config")
def test_drafts_are_accepted_as_often_as_the_reference_head_is_right(engine, name, model):
    num_drafts = ENGINES[name]["speculative_config"]["num_speculative_tokens"]
    prompts = [random_prompt(n, seed=4) for n in (5, 64, 130, 300)]
    before = engine.counters()
    answers = engine.greedy(prompts, 64)
    after = engine.counters()
    accepted, steps = (
        after[f"vllm:spec_decode_num_{what}"] - before.get(f"vllm:spec_decode_num_{what}", 0)
        for what in ("accepted_tokens", "drafts")
    )
    check_greedy(model, prompts, answers)
    expected = [
        model.accepted(prompt, answer.token_ids, num_drafts)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    made, right = (sum(column) for column in zip(*expected, strict=True))
    # The MTP layer reads the prompts one after the other, in slices; till then nothing is drafted.
    chunk = ENGINES[name].get("max_num_batched_tokens", 2048)
    until = sum(-(-tokens // chunk) for tokens in accumulate(map(len, prompts)))
    # A request's last drafts may be cut short by its token limit, so a few may differ.
    assert -num_drafts * len(prompts) - until <= accepted - right <= num_drafts * len(prompts)
    assert -len(prompts) - until <= steps - made / num_drafts <= len(prompts)


@pytest.mark.parametrize("name", ["plain", "mtp-3"], indirect=True, scope="module")
def test_samples_are_distributed_as_the_model_says(engine, name, model):
    check_sampled(engine, model, drafts=name != "plain")
