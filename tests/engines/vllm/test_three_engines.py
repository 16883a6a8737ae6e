"""In bf16 vLLM, SGLang and transformers have the same bits, with and without drafts.

test_three_engines.py of SGLang compares SGLang with transformers, and here transformers in SGLang's
environment is compared, too.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from engines.bits import INVARIANT
from engines.recomputed import ROOT, check_recomputed
from engines.three import TOKENS
from engines.three import served as served
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from needs import needs
from tiers import long_except

pytestmark = pytest.mark.serve

FLAGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 2048,
    "max_num_batched_tokens": 257,
    "speculative_config": {"method": "mtp", "num_speculative_tokens": 3},
}
OTHER = ROOT / ".venv-sglang" / "bin" / "python"


# As servers do, compiled.
@pytest.fixture(scope="module", params=long_except([False], [False, True]))
def engine(request, served) -> Iterator[Offline]:
    more = {"language_model_only": True} if served.wrapped else {}
    engine = Offline(served.folder, env=INVARIANT, enforce_eager=request.param, **FLAGS, **more)
    yield engine
    engine.close()


def test_what_transformers_recomputes(engine, served):
    """In one batch: greedy and sampled answers, without drafts and with three."""
    folder, prompts, _ = served
    found = []
    for drafts in (0, 3):
        engine.inside("draft", drafts)
        found += engine.greedy(prompts, TOKENS, **LOGPROBS)
        sampled = engine.generate(prompts, temperature=1.0, max_tokens=TOKENS, **LOGPROBS)
        found += [output for (output,) in sampled]
    check_recomputed(folder, [*prompts] * 4, found)


@pytest.mark.long
@needs("both-venvs")
def test_what_transformers_recomputes_elsewhere(engine, served):
    folder, prompts, _ = served
    found = engine.greedy(prompts, TOKENS, **LOGPROBS)
    check_recomputed(folder, prompts, found, python=str(OTHER))
