"""Qwen3.5's models, in each layout: what transformers computes, in Qwen3-Next's very bits.

Those with a vision tower are served without it here.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from checkpoints import random_prompt
from engines.checks import TOKENS, Output, check_greedy
from engines.long_context import YARN, with_yarn
from engines.vllm.checks import LOGPROBS, check_cache_hits
from engines.vllm.offline import Offline
from family import FAMILY
from reference import Reference
from tiers import long_except

pytestmark = pytest.mark.serve

# Of which the bits are compared every time: dense in a wrapper, experts in one tensor.
BOTH_KINDS = ("dense_HV=3H_wrapped_7-layers", "moe_HV=4H_top-3-of-12_5-layers")
LONG = "moe_HV=2H_wrapped_split_6-layers"  # served with YaRN, beyond the original length
PROMPTS = [random_prompt(length, seed=21) for length in (1, 3, 64, 65, 300, 1000)]
FLAGS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 2048,
    "max_num_batched_tokens": 257,  # prompts are read in slices
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 4},
}


class Served(NamedTuple):
    engine: Offline
    model: Reference
    as_qwen3_next: Path  # the same weights
    overrides: dict[str, Any]


@pytest.fixture(scope="module", params=FAMILY)
def served(request, tmp_path_factory, reference) -> Iterator[Served]:
    member, tmp_path = FAMILY[request.param], tmp_path_factory.mktemp("family")
    plain, folder = member.pair(tmp_path, seed=3)
    tower = {"language_model_only": True} if member.wrapped else {}
    overrides = {"rope_scaling": YARN} if request.param == LONG else {}
    engine = Offline(folder, **FLAGS, **tower, hf_overrides=overrides)
    model = reference(with_yarn(folder, tmp_path / "yarn") if overrides else folder)
    yield Served(engine, model, plain, overrides)
    engine.close()


def test_any_number_of_drafts_gives_what_transformers_computes(served, size):
    """From none, the plain model, to all that the flags allow."""
    for num_drafts in size((0, 1, 4), range(5)):
        served.engine.forget()
        served.engine.inside("draft", num_drafts)
        before = served.engine.counters()
        outputs = served.engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
        check_greedy(served.model, PROMPTS, outputs)
        after = served.engine.counters()
        name = "vllm:spec_decode_num_accepted_tokens"
        assert (after.get(name, 0) > before.get(name, 0)) == (num_drafts > 0)


def test_prefix_cache_hits(served):
    block = served.engine.cache()["block_size"]
    prompts = [random_prompt(n, seed=22) for n in (2 * block, 2 * block + 1)]
    check_greedy(served.model, prompts, check_cache_hits(served.engine, prompts))


@pytest.mark.parametrize("served", long_except(BOTH_KINDS, FAMILY), indirect=True, scope="module")
def test_the_same_weights_as_qwen3_next_give_the_same_bits(served):
    def answers(engine: Offline) -> tuple[list[Output], list[dict[int, list[int]]]]:
        engine.forget()
        engine.inside("draft", 2)
        outputs = engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
        return [replace(output, cached=0) for output in outputs], engine.inside("drafts")

    other = Offline(served.as_qwen3_next, **FLAGS, hf_overrides=served.overrides)
    try:
        outputs, drafts = answers(other)
    finally:
        other.close()
    assert answers(served.engine) == (outputs, drafts)
    assert any(drafts)
