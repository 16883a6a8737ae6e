"""What is asked of an engine's outputs: the same numbers as transformers, token for token."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reference import Reference

TOLERANCE = 1e-3  # fp32 log-probabilities, end to end
TOKENS = 32
LENGTHS = (1, 2, 3, 4, 63, 64, 65, 1000, 2100)  # of prompts; the last takes two steps, or more
# How weights are quantised that are also compared where activations are bf16.
SERVED_IN_BF16 = ("int8", "int4", "fp8-blocks", "gptq", "awq", "packed_4-bit", "int8-rows", "nvfp4")
Prompts = Sequence[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One finished sequence."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # of each token; None: not asked for
    prompt_logprobs: tuple[float, ...] | None  # of each prompt token but the first
    cached: int  # prompt tokens that a prefix-cache hit spared
    finish_reason: str
    text: str  # empty without a tokenizer


def check_greedy(reference: Reference, prompts: Prompts, outputs: Sequence[Output]) -> None:
    """Every token is the reference's likeliest after those before it, and has its probability.

    So the continuation is the reference's own greedy one, which one pass over it shows.
    """
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = len(output.token_ids)
        assert tokens
        likeliest, whole = reference.greedy_logprobs(prompt + output.token_ids)
        assert output.token_ids == likeliest[len(prompt) - 1 :], f"prompt of {len(prompt)}"
        _near(output.logprobs, whole[len(prompt) - 1 :], f"{tokens} tokens after {len(prompt)}")
        _near(output.prompt_logprobs, whole[: len(prompt) - 1], f"prompt of {len(prompt)}")


def _near(found: Sequence[float] | None, expected: torch.Tensor, what: str) -> None:
    if found is not None:
        assert len(found) == len(expected), what
        error = (torch.tensor(found) - expected).abs()
        assert (error < TOLERANCE).all(), f"{what}: {error.max():.1e} at {int(error.argmax())}"


def check_distance(
    folder: Path, dtype: torch.dtype, prompts: Prompts, found: Sequence[Sequence[float]]
) -> None:
    """Log-probabilities of prompts are no farther from fp32 than transformers' own in `dtype`."""
    exact, theirs = (
        [model.prompt_logprobs(prompt) for prompt in prompts]
        for model in (Reference(folder), Reference(folder, dtype))
    )
    check_no_farther(found, theirs, exact)


def check_no_farther(
    found: Sequence[Sequence[float]], theirs: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]
) -> None:
    """Our log-probabilities of each prompt's tokens are no farther from exact ones than theirs."""

    def distances(logprobs: Sequence[Sequence[float] | torch.Tensor]) -> torch.Tensor:
        pairs = zip(logprobs, exact, strict=True)
        return torch.cat([(torch.as_tensor(each) - right).abs() for each, right in pairs])

    ours, other = distances(found), distances(theirs)
    # Three standard errors of each: how often a token is farther, and by how much. A router that
    # picks another expert makes a few tokens differ much, and then their neighbours too, now here
    # and now there: the means of two right models differ by a tenth.
    excess = ours - other
    error = len(excess) ** -0.5
    assert excess.mean() <= 3 * error * excess.std() + 0.1 * other.mean()
    assert (excess > 0).double().mean() <= 0.5 + 3 * error * 0.5
