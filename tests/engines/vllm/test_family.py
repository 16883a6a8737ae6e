"""Qwen3.5's models, in each layout: what transformers computes, in Qwen3-Next's very bits.

Those with a vision tower are served without it here.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from checkpoints import random_prompt
from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS, check_cache_hits
from engines.vllm.offline import Offline
from family import FAMILY
from reference import Reference

pytestmark = pytest.mark.serve

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
    as_qwen3_next: Offline  # the same weights


@pytest.fixture(scope="module", params=FAMILY)
def served(request, tmp_path_factory, reference) -> Iterator[Served]:
    member = FAMILY[request.param]
    plain, folder = member.pair(tmp_path_factory.mktemp("family"), seed=3)
    tower = {"language_model_only": True} if member.wrapped else {}
    engine, other = Offline(folder, **FLAGS, **tower), Offline(plain, **FLAGS)
    yield Served(engine, reference(folder), other)
    engine.close()
    other.close()


def test_any_number_of_drafts_gives_what_transformers_computes(served):
    """From none, the plain model, to all that the flags allow."""
    for k in range(5):
        served.engine.forget()
        served.engine.inside("draft", k)
        before = served.engine.counters()
        outputs = served.engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
        check_greedy(served.model, PROMPTS, outputs)
        after = served.engine.counters()
        name = "vllm:spec_decode_num_accepted_tokens"
        assert (after.get(name, 0) > before.get(name, 0)) == (k > 0)


def test_prefix_cache_hits(served):
    block = served.engine.cache()["block_size"]
    prompts = [random_prompt(n, seed=22) for n in (2 * block, 2 * block + 1)]
    check_greedy(served.model, prompts, check_cache_hits(served.engine, prompts))


def test_the_same_weights_as_qwen3_next_give_the_same_bits(served):
    found = []
    for engine in (served.engine, served.as_qwen3_next):
        engine.forget()
        engine.inside("draft", 2)
        outputs = engine.greedy(PROMPTS, TOKENS, **LOGPROBS)
        found.append([replace(output, cached=0) for output in outputs])
        found.append(engine.inside("drafts"))
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert any(found[1])
