"""In bf16 a token has the same bits alone, in a batch, in other chunks and with drafts."""

from collections.abc import Iterator, Sequence

import pytest

from checkpoints import SHIPPED
from engines.checks import Output
from engines.traffic import source_tokens
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

LENGTHS = (1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 129, 200, 255, 300, 511, 700, 1300)
TOKENS = 24
FLAGS = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_batched_tokens": 257,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}


@pytest.fixture(scope="module")
def prompts() -> list[tuple[int, ...]]:
    ids = source_tokens()
    return [tuple(ids[37 * i :][:length]) for i, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def engine() -> Iterator[Offline]:
    engine = Offline(SHIPPED, env={"QWEN3NEXT_BATCH_INVARIANT": "1"}, **FLAGS)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def alone(engine, prompts) -> Sequence[Output]:
    engine.inside("draft", 0)
    return [engine.greedy([ids], TOKENS, **LOGPROBS)[0] for ids in prompts]


@pytest.mark.parametrize("drafts", [0, 1, 2, 3])
def test_together_and_with_drafts(engine, prompts, alone, drafts):
    engine.inside("draft", drafts)
    found = engine.greedy(prompts, TOKENS, **LOGPROBS)
    for one, other in zip(found, alone, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs
