"""What is asked of several of vLLM's engines: cache hits that change nothing, and samples."""

import torch

from engines import distribution
from engines.checks import TOKENS, Output, Prompts
from engines.vllm.offline import Offline
from reference import Reference

LOGPROBS = {"logprobs": 0, "prompt_logprobs": 0}


def check_cache_hits(engine: Offline, prompts: Prompts, tokens: int = TOKENS) -> list[Output]:
    """The second run of the same prompts hits the prefix cache and yields the same tokens."""
    engine.forget()
    cold = engine.greedy(prompts, tokens, logprobs=0)
    warm = engine.greedy(prompts, tokens, logprobs=0)
    assert [output.cached for output in cold] == [0] * len(prompts)
    assert min(output.cached for output in warm) > 0
    assert [output.token_ids for output in warm] == [output.token_ids for output in cold]
    return warm


def check_sampled(engine: Offline, model: Reference, *, drafts: bool) -> None:
    """At temperature 1 a token's distribution is the model's own, while drafts are accepted."""
    name = "vllm:spec_decode_num_accepted_tokens"
    before = engine.counters().get(name, 0)
    (outputs,) = engine.generate(
        [distribution.PROMPT],
        n=distribution.SAMPLES,
        temperature=1.0,
        max_tokens=distribution.TOKENS,
    )
    accepted = engine.counters().get(name, 0) - before
    assert (
        accepted > 0.1 * distribution.SAMPLES
    ) == drafts  # else the check would not see what it is for
    distribution.check_sampled(model, torch.tensor([output.token_ids for output in outputs]))
