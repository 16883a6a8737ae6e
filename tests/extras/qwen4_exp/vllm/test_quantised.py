"""Quantised checkpoints of Qwen4-Exp under vLLM: what transformers computes with what they say."""

import pytest

from engines.checks import TOKENS, check_greedy
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from extras.qwen4_exp.model import StreamsReference
from extras.qwen4_exp.quantised import IN_PANELS, PROMPTS, write_kind, write_split
from quantised import AT_LOAD, KINDS, MIXED
from tiers import long_except

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_split(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "kind", long_except((MIXED, IN_PANELS), (MIXED, IN_PANELS, *AT_LOAD, *KINDS))
)
def test_with_and_without_drafts(plain, tmp_path, kind):
    """Also with tables in FP8, if the files are quantised; one compiled."""
    served, env, twin = write_kind(plain, tmp_path, kind)
    engine = Offline(
        served,
        env=env | {"QWEN3NEXT_DRAFTS": "fixed"},
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=257,
        enforce_eager=kind != "int4",
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    )
    outputs = []
    try:
        for drafts in (0, 3):
            engine.inside("draft", drafts)
            engine.forget()
            outputs.append(engine.greedy(PROMPTS, TOKENS, **LOGPROBS))
        accepted = engine.counters()["vllm:spec_decode_num_accepted_tokens"]
    finally:
        engine.close()
    model = StreamsReference(twin)
    for each in outputs:
        check_greedy(model, PROMPTS, each)
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]
    assert accepted > 0
