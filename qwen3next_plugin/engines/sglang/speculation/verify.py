"""Verification of drafts by SGLang's plain sampler: drafts change the speed, not the text.

Each node of a draft, chain or tree, has a row of logits for the token after it. From the root on,
the plain sampler samples the row with its request's parameters and, if seeds count, with the seed
and position of the plain step. If a child of the node is the sampled token, that draft is accepted,
and its row is next; otherwise the token is the step's last. Therefore

- every token is a sample of the plain sampler, whatever the drafts are. A draft x is accepted with
  probability p(x), the same rate at which rejection sampling accepts it;
- what depends on the answer so far, as penalties do, counts the drafts before a row;
- a token costs as much sampling as without drafts: rows after a rejected draft are not sampled.

SGLang's own verification on a CPU is greedy at every temperature.
"""

from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.engines.sglang.speculation.custom_processors import apply_custom_processors
from qwen3next_plugin.engines.sglang.speculation.logits import allow_a_token
from qwen3next_plugin.engines.sglang.speculation.penalties import penalizers_of_rows

# Fields of SGLang's sampling parameters with one entry per request: changes of logits, sums of
# penalties (which do not count drafts), and parameters of sampling.
OF_LOGITS = ("logit_bias",)
SUMS = ("acc_additive_penalties", "acc_scaling_penalties")
OF_REQUEST = ("temperatures", "top_ps", "top_ks", "min_ps", "sampling_seed")


@patch(
    When.ON_CPU,
    "sglang.srt.speculative.eagle_utils.eagle_sample",
    reason="SGLang verifies greedily on a CPU, whatever the temperature, and elsewhere samples "
    "with other limits and other seeds than its plain sampler",
    remove_when="SGLang's verification samples what its plain sampler samples",
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
    info = batch.sampling_info
    logits = logits_output.next_token_logits  # [T, V]
    penalised = info.acc_additive_penalties is not None
    # Each row's request, and the drafts before the row, [T] each; empty where they do not matter.
    request, drafts = torch.empty(0), list[tuple[int, ...]]()
    if penalised or info.logit_bias is not None or info.has_custom_logit_processor:
        roots = verify_input.retrieve_index[:, 0].contiguous()
        request = torch.searchsorted(roots, torch.arange(len(logits)), right=True) - 1
        drafts = _drafts_before_rows(verify_input)
    of_nodes = _select(info, request, OF_LOGITS)
    of_nodes.grammar_mask = grammar_mask
    if penalised:
        vars(of_nodes).update(dict.fromkeys(SUMS))
        of_nodes.penalizer_orchestrator = penalizers_of_rows(
            info.penalizers, batch.reqs, request, drafts
        )
    of_nodes.apply_logits_bias(logits)
    if info.has_custom_logit_processor:
        apply_custom_processors(logits, info, request, drafts)
        if grammar_mask is not None or not info.is_all_greedy:
            allow_a_token(logits, grammar_mask)
    positions = verify_input.positions
    if info.is_all_greedy:
        likeliest = _sample(logits, of_nodes, positions)
        return _accept(verify_input, lambda _, rows: [likeliest[row] for row in rows])

    def sample(requests: list[int], rows: list[int]) -> list[int]:
        row = torch.tensor(rows)
        params = _select(info, torch.tensor(requests), OF_REQUEST)
        return _sample(logits[row], params, positions[row])

    return _accept(verify_input, sample)


def _select(info: Any, request: torch.Tensor, names: Sequence[str]) -> Any:
    """The rows' parameters; custom processors are applied already. Shapes: request [rows]."""
    rows = copy(info)
    for name in names:
        if (values := getattr(info, name)) is not None:
            setattr(rows, name, values[request])
    rows.has_custom_logit_processor = False
    rows.sampling_mask_batch_indices = None
    return rows


def _drafts_before_rows(verify_input: Any) -> list[tuple[int, ...]]:
    """The drafts from the root of its tree to each row; none at a root."""
    drafts = verify_input.draft_token.tolist()
    rows = verify_input.retrieve_index.tolist()
    child = verify_input.retrieve_next_token.tolist()
    sibling = verify_input.retrieve_next_sibling.tolist()
    found: list[tuple[int, ...]] = [()] * len(drafts)
    for request, row in enumerate(rows):
        nodes = [0]
        for parent in nodes:  # grows
            node = child[request][parent]
            while node >= 0:
                found[row[node]] = (*found[row[parent]], drafts[row[node]])
                nodes.append(node)
                node = sibling[request][node]
    return found


def _sample(logits: torch.Tensor, rows: Any, positions: torch.Tensor) -> list[int]:
    """A token of each row, the same on all ranks; logits [rows, V] may be changed in place."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput
    from sglang.srt.runtime_context import get_parallel

    output = LogitsProcessorOutput(next_token_logits=logits)
    token_ids = _sampler()(output, rows, False, [], [], positions).long()
    group = get_parallel().tp_group
    return (group.broadcast(token_ids, src=0) if group.world_size > 1 else token_ids).tolist()


@cache
def _sampler() -> Any:
    from sglang.srt.layers.sampler import create_sampler

    return create_sampler()


def _accept(
    verify_input: Any, sample: Callable[[list[int], list[int]], list[int]]
) -> tuple[torch.Tensor, ...]:
    """Follow sampled tokens through each request's draft; returns what `eagle_sample` returns.

    sample: requests, and for each its row of logits → token ids
    """
    N, depth = len(verify_input.retrieve_index), verify_input.max_tree_depth
    # Lists: a dozen operators on such small tensors would take longer.
    drafts = verify_input.draft_token.tolist()
    rows = verify_input.retrieve_index.tolist()
    child = verify_input.retrieve_next_token.tolist()
    sibling = verify_input.retrieve_next_sibling.tolist()
    predict = [0] * len(drafts)
    accept_index = [[-1] * depth for _ in range(N)]
    accept_lens = [0] * N
    going_on = [(request, 0) for request in range(N)]  # request and the node it has reached
    for accepted in range(depth):
        at = [rows[request][node] for request, node in going_on]
        token_ids = sample([request for request, _ in going_on], at)
        reached, going_on = going_on, []
        for (request, node), row, token in zip(reached, at, token_ids, strict=True):
            predict[row] = token
            accept_index[request][accepted] = row
            accept_lens[request] += 1
            node = child[request][node]
            while node >= 0 and drafts[rows[request][node]] != token:
                node = sibling[request][node]
            if node >= 0:
                going_on.append((request, node))
        if not going_on:
            break
    found = (predict, accept_lens, accept_index)
    return tuple(torch.tensor(values, dtype=torch.int32) for values in found)
