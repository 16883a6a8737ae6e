"""Verification of drafts by SGLang's plain sampler: drafts change the speed, not the text.

Each node of a draft, chain or tree, has a row of logits for the token after it. The plain sampler
samples every row with its request's parameters and, if seeds count, with the seed and position of
the plain step. A draft is accepted while it equals the token sampled in its parent's row; the first
sampled token that is no draft is the step's last. Therefore every token is a sample of the plain
sampler, whatever the drafts are. A draft x is accepted with probability p(x), the same rate at
which rejection sampling accepts it.

SGLang's own verification on a CPU is greedy at every temperature.
"""

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any

import torch

# What SGLang's sampling parameters have for each request: [N] or [N, …].
OF_REQUEST = (
    *("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed", "logit_bias"),
    *("acc_additive_penalties", "acc_scaling_penalties"),
)


def sample_as_plain(
    host: Callable[..., Any],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    **options: Any,
) -> Any:
    """Replace `eagle_sample`; an idle batch is left to it.

    Remove when SGLang's verification samples what its plain sampler samples.
    """
    if batch.forward_mode.is_idle():
        return host(verify_input, batch, logits_output, grammar_mask, **options)
    from sglang.srt.layers.sampler import apply_custom_logit_processor

    info, nodes = batch.sampling_info, verify_input.draft_token_num
    logits = logits_output.next_token_logits  # [N · nodes, V]
    rows = _spread(info, nodes)
    rows.grammar_mask = grammar_mask
    rows.apply_logits_bias(logits)
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits, info, nodes)
    if grammar_mask is not None or not info.is_all_greedy:
        _allow_a_token(logits, grammar_mask)
    return _accept(verify_input, _sample(logits, rows, verify_input.positions))


def _spread(info: Any, nodes: int) -> Any:
    """The parameters as if each row were a request; custom processors are applied already."""
    rows = copy(info)
    for name in OF_REQUEST:
        if (values := getattr(info, name)) is not None:
            setattr(rows, name, values.repeat_interleave(nodes, dim=0))
    rows.has_custom_logit_processor = False
    rows.sampling_mask_batch_indices = None
    return rows


def _allow_a_token(logits: torch.Tensor, grammar_mask: Any) -> None:
    """Let the grammar win where it allows only the end, which min_new_tokens forbids.

    A row without a distribution would end the server. Shapes: logits [rows, V], changed in place.
    """
    empty = logits.amax(1).isneginf()
    if empty.any():
        allowed = torch.zeros_like(logits)
        if grammar_mask is not None:
            grammar_mask.apply(allowed)
        logits[empty] = allowed[empty]


def _sample(logits: torch.Tensor, rows: Any, positions: torch.Tensor) -> torch.Tensor:
    """A token of each row, the same on all ranks. Shapes: logits [rows, V], returns [rows]."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.runtime_context import get_parallel

    # The sampler turns logits into probabilities in place; log-probabilities need them later.
    output = LogitsProcessorOutput(next_token_logits=logits.clone())
    token_ids = _sampler()(output, rows, False, [], [], positions)
    group = get_parallel().tp_group
    return group.broadcast(token_ids, src=0) if group.world_size > 1 else token_ids


@cache
def _sampler() -> Any:
    from sglang.srt.layers.sampler import create_sampler

    return create_sampler()


def _accept(verify_input: Any, token_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Follow the sampled tokens through the draft; returns what `eagle_sample` returns."""
    from sglang.srt.speculative.eagle_utils import verify_tree_greedy_func

    candidates = verify_input.draft_token.view(-1, verify_input.draft_token_num)  # [N, nodes]
    N = len(candidates)
    predict, accept_index, accepted = verify_tree_greedy_func(
        predicts=torch.zeros(len(token_ids), dtype=torch.int32),
        accept_index=torch.full((N, verify_input.max_tree_depth), -1, dtype=torch.int32),
        accept_token_num=torch.empty(N, dtype=torch.int32),
        candidates=candidates,
        retrieve_index=verify_input.retrieve_index,
        retrieve_next_token=verify_input.retrieve_next_token,
        retrieve_next_sibling=verify_input.retrieve_next_sibling,
        target_predict=token_ids.view(N, -1).long(),
        topk=verify_input.tree_topk,
    )
    return predict, accepted + 1, accept_index
