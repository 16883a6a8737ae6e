"""What is asked of an engine's outputs: the same numbers as transformers, token for token."""

from collections.abc import Sequence

import torch

from engines.vllm.offline import Offline, Output
from reference import Reference

TOLERANCE = 1e-3  # fp32 log-probabilities, end to end
TOKENS = 32
LOGPROBS = {"logprobs": 0, "prompt_logprobs": 0}
Prompts = Sequence[tuple[int, ...]]


def check_greedy(reference: Reference, prompts: Prompts, outputs: Sequence[Output]) -> None:
    """Continuations are the reference's, and so is the log-probability of every token."""
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = len(output.token_ids)
        assert output.token_ids == reference.greedy(prompt, tokens), f"prompt of {len(prompt)}"
        whole = reference.prompt_logprobs(prompt + output.token_ids)
        _near(output.logprobs, whole[len(prompt) - 1 :], f"{tokens} tokens after {len(prompt)}")
        _near(output.prompt_logprobs, whole[: len(prompt) - 1], f"prompt of {len(prompt)}")


def _near(found: Sequence[float], expected: torch.Tensor, what: str) -> None:
    if found:
        error = (torch.tensor(found) - expected).abs()
        assert error.max() < TOLERANCE, f"{what}: {error.max():.1e} at {int(error.argmax())}"


def check_cache_hits(engine: Offline, prompts: Prompts, tokens: int = TOKENS) -> list[Output]:
    """The second run of the same prompts hits the prefix cache and yields the same tokens."""
    engine.forget()
    cold = engine.greedy(prompts, tokens, logprobs=0)
    warm = engine.greedy(prompts, tokens, logprobs=0)
    assert [output.cached for output in cold] == [0] * len(prompts)
    assert min(output.cached for output in warm) > 0
    assert [output.token_ids for output in warm] == [output.token_ids for output in cold]
    return warm
