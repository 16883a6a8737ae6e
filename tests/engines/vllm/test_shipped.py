"""The shipped checkpoint, served with MTP, computes what transformers computes on real text."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from checkpoints import SHIPPED, random_prompt
from engines.checks import LENGTHS, TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS, check_sampled
from engines.vllm.offline import Offline

pytestmark = pytest.mark.serve

DRAFTS = {"method": "mtp", "num_speculative_tokens": 3}
LAYER = "model.layers.1.linear_attn"
FIX = r".* Restart the engine\. .* --no-enable-prefix-caching"


@pytest.fixture(scope="module")
def engine() -> Iterator[Offline]:
    flags = {"dtype": "float32", "max_model_len": 8192, "speculative_config": DRAFTS}
    engine = Offline(SHIPPED, env={"QWEN3NEXT_DRAFTS": "fixed"}, **flags)
    yield engine
    engine.close()


def test_parity_on_the_standard_librarys_source(engine, reference):
    """Each length alone and all in one batch; three drafts a step, many of them right."""
    source = Path(textwrap.__file__).read_text() * 2
    ids = Tokenizer.from_file(str(SHIPPED / "tokenizer.json")).encode(source).ids
    assert len(ids) > max(LENGTHS)
    prompts = [tuple(ids[:length]) for length in LENGTHS]
    before = engine.counters()
    together = engine.greedy(prompts, TOKENS, **LOGPROBS)
    alone = [engine.greedy([prompt], TOKENS)[0] for prompt in prompts]
    after = engine.counters()
    check_greedy(reference(SHIPPED), prompts, together)
    check_greedy(reference(SHIPPED), prompts, alone)
    drafted, accepted = (
        after[name] - before.get(name, 0)
        for name in (f"vllm:spec_decode_num_{what}_tokens" for what in ("draft", "accepted"))
    )
    assert accepted > 0.4 * drafted


@pytest.mark.long  # test_parity has it with random weights
def test_samples_are_distributed_as_the_model_says(engine, reference):
    check_sampled(engine, reference(SHIPPED), drafts=True)


def test_an_error_names_the_request_whose_page_or_slot_is_broken(engine):
    """The step ends, and so do its requests; the engine goes on."""
    prompts = [random_prompt(n, seed=9) for n in (5, 70, 30)]
    page = rf"request broken-1\S*: {LAYER}: row 1: slot \d+ holds start=\d+ end=\d+ .* c=\d+"
    with pytest.raises(AssertionError, match=page + FIX):
        engine.inside("decode_broken", "page", prompts, 1, LAYER)
    slot = r"request broken-2\S*: row 2 has a slot outside \[0, \d+\): 1000000"
    with pytest.raises(AssertionError, match=slot + FIX):
        engine.inside("decode_broken", "slot", prompts, 2, LAYER)
    assert [len(output.token_ids) for output in engine.greedy(prompts, 8)] == [8] * 3
