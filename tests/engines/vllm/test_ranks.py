"""Two tensor-parallel ranks compute what one does; in bf16 they give the same bits in any batch."""

import pytest

from checkpoints import SHIPPED, random_prompt, write_checkpoint
from engines.bits import INVARIANT
from engines.bits import prompts as texts
from engines.checks import check_greedy
from engines.lora import make_adapter
from engines.vllm.checks import LOGPROBS
from engines.vllm.offline import Offline
from family import FAMILY
from needs import needs
from reference import Reference

pytestmark = [
    pytest.mark.serve,
    needs("two-cores"),
]


# Few tokens: ranks wait for each other busily, which is slow where they share their cores.
PROMPTS = [random_prompt(n, seed=12) for n in (1, 130)]
MODELS = {"qwen3-next": None, "qwen3.5": "dense_HV=3H_wrapped_7-layers"}  # one of FAMILY


@pytest.mark.parametrize("member", MODELS.values(), ids=MODELS)
def test_two_ranks_with_drafts_and_an_adapter(tmp_path, member):
    folder = tmp_path / "model"
    model = FAMILY[member].write(folder) if member else write_checkpoint(folder)
    plain, merged = Reference(model), Reference(model)
    adapter = make_adapter(tmp_path / "adapter", merged)
    engine = Offline(
        model,
        dtype="float32",
        max_model_len=1024,
        tensor_parallel_size=2,
        speculative_config={"method": "mtp", "num_speculative_tokens": 2},
        enable_lora=True,
        language_model_only=True,
    )
    try:
        without = engine.greedy(PROMPTS, 10, **LOGPROBS)
        adapted = engine.greedy(PROMPTS, 4, **LOGPROBS, adapter=str(adapter))
        counters = engine.counters()
    finally:
        engine.close()
    check_greedy(plain, PROMPTS, without)
    check_greedy(merged, PROMPTS, adapted)
    assert counters["vllm:qwen3next_steps"] > 0  # the first rank's, from another process


@pytest.mark.long
def test_two_ranks_give_the_same_bits_again_in_a_batch_and_with_drafts():
    prompts = texts(many=False)[::3]
    found = []
    for more in ({}, {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}):
        engine = Offline(
            SHIPPED,
            env=INVARIANT | {"QWEN3NEXT_DRAFTS": "fixed"},
            dtype="bfloat16",
            max_model_len=1024,
            max_num_batched_tokens=257,
            tensor_parallel_size=2,
            **more,
        )
        try:
            found.append([engine.greedy([ids], 8, **LOGPROBS)[0] for ids in prompts])
            engine.forget()
            found.append(engine.greedy(prompts, 8, **LOGPROBS))
            drafted = engine.counters().get("vllm:spec_decode_num_draft_tokens", 0)
        finally:
            engine.close()
        assert (drafted > 0) == bool(more)
    bits = [[(o.token_ids, o.logprobs, o.prompt_logprobs) for o in run] for run in found]
    assert bits[1:] == bits[:1] * 3
