"""Verification of drafts by SGLang's plain sampler: drafts change the speed, not the text.

Each node of a draft, chain or tree, has a row of logits for the token after it. From the root on,
the plain sampler samples the row with its request's parameters and, if seeds count, with the seed
and position of the plain step. If a child of the node is the sampled token, that draft is accepted,
and its row is next; otherwise the token is the step's last. Therefore

- every token is a sample of the plain sampler, whatever the drafts are. A draft x is accepted with
  probability p(x), the same rate at which rejection sampling accepts it;
- a token costs as much sampling as without drafts: rows after a rejected draft are not sampled.

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
    of_nodes = _select(info, torch.arange(len(batch.seq_lens)).repeat_interleave(nodes))
    of_nodes.grammar_mask = grammar_mask
    of_nodes.apply_logits_bias(logits)
    if info.has_custom_logit_processor:
        apply_custom_logit_processor(logits, info, nodes)
    if grammar_mask is not None or not info.is_all_greedy:
        _allow_a_token(logits, grammar_mask)
    positions = verify_input.positions
    if info.is_all_greedy:
        likeliest = _sample(logits, of_nodes, positions)
        return _accept(verify_input, lambda request, row: likeliest[row])
    return _accept(
        verify_input,
        lambda request, row: _sample(logits[row], _select(info, request), positions[row]),
    )


def _select(info: Any, request: torch.Tensor) -> Any:
    """The parameters of rows; custom processors are applied already. Shapes: request [rows]."""
    rows = copy(info)
    for name in OF_REQUEST:
        if (values := getattr(info, name)) is not None:
            setattr(rows, name, values[request])
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
    """A token of each row, the same on all ranks; logits [rows, V] may be changed in place."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.runtime_context import get_parallel

    output = LogitsProcessorOutput(next_token_logits=logits)
    token_ids = _sampler()(output, rows, False, [], [], positions).long()
    group = get_parallel().tp_group
    return group.broadcast(token_ids, src=0) if group.world_size > 1 else token_ids


@cache
def _sampler() -> Any:
    from sglang.srt.layers.sampler import create_sampler

    return create_sampler()


def _accept(
    verify_input: Any, sample: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """Follow sampled tokens through each request's draft; returns what `eagle_sample` returns.

    Shapes: sample (requests [M], their rows of logits [M]) → token ids [M]
    """
    drafts = verify_input.draft_token.view(-1, verify_input.draft_token_num)  # [N, nodes]
    N, depth = len(drafts), verify_input.max_tree_depth
    predict = torch.zeros(drafts.numel(), dtype=torch.int32)
    accept_index = torch.full((N, depth), -1, dtype=torch.int32)
    accept_lens = torch.zeros(N, dtype=torch.int32)
    request, node = torch.arange(N), torch.zeros(N, dtype=torch.int64)  # of drafts that go on
    for accepted in range(depth):
        row = verify_input.retrieve_index[request, node]
        token_ids = sample(request, row)
        predict[row] = token_ids.int()
        accept_index[request, accepted] = row.int()
        accept_lens[request] += 1
        child = _child(verify_input, drafts, request, node, token_ids)
        request, node = request[child >= 0], child[child >= 0]
        if not len(request):
            break
    return predict, accept_lens, accept_index


def _child(
    verify_input: Any,
    drafts: torch.Tensor,
    request: torch.Tensor,
    node: torch.Tensor,
    token_ids: torch.Tensor,
) -> torch.Tensor:
    """The child of each request's node that is the token [M]; -1 where there is none."""
    child = verify_input.retrieve_next_token[request, node]
    while True:
        at = child.clamp(min=0)
        other = (child >= 0) & (drafts[request, at] != token_ids)
        if not other.any():
            return child
        child = torch.where(other, verify_input.retrieve_next_sibling[request, at], child)
