"""What a verification samples from: at each node the distribution that plain decoding has there."""

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
    """Around `eagle_sample`: with custom logit processors, and with all limits at once.

    SGLang's leaves processors and min_p out, and measures top_p within what top_k has kept, which
    its plain sampler on a CPU does not. Can go when it samples from what the plain sampler does.
    """
    if batch.forward_mode.is_idle():
        return host(verify_input, batch, logits_output, grammar_mask, **options)
    info, batch = batch.sampling_info, copy(batch)
    if info.has_custom_logit_processor:
        grammar_mask = Processors(grammar_mask, info, verify_input.draft_token_num)
    batch.sampling_info = _with_limits(info)
    return host(verify_input, batch, logits_output, grammar_mask, **options)


def _with_limits(info: Any) -> Any:
    """For `sampling.top_k_renorm_prob`: [N, 3] of top_k, top_p and min_p in the place of top_ks."""
    limited = copy(info)
    limited.need_top_k_sampling = (
        info.need_top_k_sampling or info.need_top_p_sampling or info.need_min_p_sampling
    )
    limited.need_top_p_sampling = False
    limited.top_ks = torch.stack([info.top_ks.double(), info.top_ps, info.min_ps], dim=1)
    return limited


class Processors:
    """A grammar's mask, if there is one, and after it the processors, as in plain decoding."""

    def __init__(self, grammar_mask: Any, info: Any, tokens: int) -> None:
        self.grammar_mask, self.info, self.tokens = grammar_mask, info, tokens

    def apply(self, logits: torch.Tensor) -> None:
        """Shapes: logits [N * tokens, V], written."""
        from sglang.srt.layers.sampler import apply_custom_logit_processor

        if self.grammar_mask is not None:
            self.grammar_mask.apply(logits)
        apply_custom_logit_processor(logits, self.info, self.tokens)
