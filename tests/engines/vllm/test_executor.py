"""A worker process is called once a step, and twice where a grammar decides what may follow."""

import pytest

from checkpoints import SHIPPED
from engines.traffic import source_tokens
from engines.vllm.offline import Offline
from qwen3next_plugin.engines.pacing import TIMEOUT

pytestmark = pytest.mark.serve

PROMPTS = [tuple(source_tokens()[:20]), tuple(source_tokens()[300:361])]
GUIDED = {"structured_outputs": {"regex": "[0-9]{8,}"}, "detokenize": True}
DRAFTS = {"method": "mtp", "num_speculative_tokens": 2}


def test_a_worker_process_is_called_once_a_step():
    engine = Offline(
        SHIPPED,
        dtype="float32",
        max_model_len=256,
        skip_tokenizer_init=False,
        distributed_executor_backend="mp",
        speculative_config=DRAFTS,
    )
    try:
        engine.inside("count_calls")
        outputs = engine.greedy(PROMPTS, 24)
        calls = engine.inside("calls")
        drafted = engine.counters()["vllm:spec_decode_num_draft_tokens"]
        (guided,) = engine.greedy(PROMPTS[:1], 8, **GUIDED)
        with_grammar = engine.inside("calls")
        timeouts = engine.inside("timeouts")
    finally:
        engine.close()
    # vLLM's own 300 s would end the engine in a long prompt's step on few cores.
    assert timeouts == {TIMEOUT}
    assert [len(output.token_ids) for output in outputs] == [24, 24]
    assert drafted > 0
    assert calls.pop("tokens") > calls["steps"]
    assert calls == {"steps": calls["steps"], "run_step": calls["steps"]}
    assert guided.text.isdigit()
    steps = with_grammar["steps"] - calls["steps"]
    assert with_grammar["sample_and_draft"] == steps > 0
    # and steps of no token, while the grammar is compiled
    assert with_grammar["execute_model"] >= steps
    assert with_grammar["run_step"] == calls["run_step"]
