"""What is asked of vLLM's prefix cache: hits, and the same tokens with them."""

from engines.checks import TOKENS, Output, Prompts
from engines.vllm.offline import Offline

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
