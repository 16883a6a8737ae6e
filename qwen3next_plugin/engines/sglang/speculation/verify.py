"""Verification of drafts by SGLang, from the distributions that plain decoding samples from."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch


def sample_as_plain(
    host: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    **options: Any,
) -> Any:
    """Wrap `eagle_sample`: apply custom logit processors, and all limits at once.

    SGLang's function ignores custom processors and min_p, and it applies top_p to what top_k has
    left, while its plain sampler on a CPU applies both to the full distribution. Remove when
    verification samples from the same distribution as the plain sampler.
    """
    if batch.forward_mode.is_idle():
        return host(verify_input, batch, logits_output, grammar_mask, **options)
    info, batch = batch.sampling_info, copy(batch)
    if grammar_mask is not None or info.has_custom_logit_processor or not info.is_all_greedy:
        grammar_mask = Mask(grammar_mask, info, verify_input.draft_token_num)
    batch.sampling_info = _with_limits(info)
    return host(verify_input, batch, logits_output, grammar_mask, **options)


def _with_limits(info: Any) -> Any:
    """Put [N, 3] of top_k, top_p and min_p into top_ks, for `sampling.top_k_renorm_prob`."""
    limited = copy(info)
    limited.need_top_k_sampling = (
        info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling
    )
    limited.need_top_p_sampling = False
    limited.top_ks = torch.stack([info.top_ks.double(), info.top_ps, info.min_ps], dim=1)
    return limited


class Mask:
    """The grammar's mask, if any, then custom processors, in the order of plain decoding."""

    def __init__(self, grammar_mask: Any, info: Any, tokens: int) -> None:
        self.grammar_mask, self.info, self.tokens = grammar_mask, info, tokens

    def apply(self, logits: torch.Tensor) -> None:
        """Shapes: logits [N * tokens, V], updated in place."""
        from sglang.srt.layers.sampler import apply_custom_logit_processor

        if self.grammar_mask is not None:
            self.grammar_mask.apply(logits)
        if self.info.has_custom_logit_processor:
            apply_custom_logit_processor(logits, self.info, self.tokens)
        # min_new_tokens forbids the only token that a complete grammar allows, the end. Let the
        # grammar win: a row without a distribution would end the server.
        empty = logits.amax(1).isneginf()
        if empty.any():
            allowed = torch.zeros_like(logits)
            if self.grammar_mask is not None:
                self.grammar_mask.apply(allowed)
            logits[empty] = allowed[empty]
