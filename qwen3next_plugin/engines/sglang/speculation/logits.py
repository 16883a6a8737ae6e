"""Repairs rows of logits from which no token can be sampled: they would end the server."""

from collections.abc import Callable
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.ON_CPU,
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo."
    "_apply_post_grammar_logits_transforms",
    reason="where min_new_tokens forbids all tokens that a grammar allows, or all there are, "
    "nothing is left to sample from, which ends the scheduler",
    remove_when="SGLang's min_new_tokens leaves a token",
)
def keep_a_token(host: Callable[..., None], info: Any, logits: torch.Tensor) -> None:
    """Wrap `SamplingBatchInfo._apply_post_grammar_logits_transforms`, the last change of logits."""
    host(info, logits)
    penalizers = info.penalizer_orchestrator
    penalised = info.acc_additive_penalties is not None or (penalizers and penalizers.is_required)
    if penalised or info.grammar_mask is not None:
        allow_a_token(logits, info.grammar_mask)


def allow_a_token(logits: torch.Tensor, grammar_mask: Any) -> None:
    """Allow the end token if the grammar allows nothing else, even if min_new_tokens forbids it.

    Without a grammar, allow every token. Shapes: logits [rows, V], changed in place.
    """
    empty = logits.amax(1).isneginf()
    if empty.any():
        allowed = torch.zeros_like(logits)
        if grammar_mask is not None:
            grammar_mask.apply(allowed)
        logits[empty] = allowed[empty]
