"""Penalties and min_new_tokens: count every token of an answer once, and drafts before a row.

SGLang counts one token per request and step, and applies the penalties of a request's last token to
all its rows in a verification.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any
from weakref import WeakKeyDictionary

import torch

from qwen3next_plugin.engines.sglang.patches import When, patch

# For each request: its number of retractions, and the tokens counted since the last one.
_counted: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


@patch(
    When.ON_CPU,
    "sglang.srt.managers.schedule_batch.ScheduleBatch.cumulate_penalty_output_tokens",
    reason="SGLang counts one token of each request a step; a verification commits several",
    remove_when="SGLang counts all of them",
    upstream="https://github.com/sgl-project/sglang/pull/33643",
)
def count_every_token(host: Callable[[Any], None], batch: Any) -> None:
    """Wrap `ScheduleBatch.cumulate_penalty_output_tokens`: count all that a step committed.

    SGLang counts only the last token of each request, also when a verification commits several.
    Remove when it counts them all.
    """
    if batch.spec_info is None:  # without NEXTN
        host(batch)
        return
    uncounted = [_uncounted(request) for request in batch.reqs]
    if all(len(token_ids) == 1 for token_ids in uncounted):
        host(batch)
        return
    penalizers = batch.sampling_info.penalizer_orchestrator.penalizers.values()
    for row, (request, token_ids) in enumerate(zip(batch.reqs, uncounted, strict=True)):
        if token_ids and is_penalised(request.sampling_params):
            for penalizer in penalizers:
                count(penalizer, row, torch.tensor(token_ids, device=batch.device))


@patch(
    When.ON_CPU,
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend",
    reason="after a retraction SGLang's penalties forget the answer so far",
    remove_when="SGLang counts what it reads again",
)
def count_what_is_read_again(host: Callable[[Any], None], batch: Any) -> None:
    """Wrap `ScheduleBatch.prepare_for_extend`: count the answers of requests that were retracted.

    SGLang restarts their counts at zero. Remove when it counts what it reads again.
    """
    host(batch)
    _count_answers(batch)


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.decode_schedule_batch_mixin."
    "ScheduleBatchDisaggregationDecodeMixin.prepare_for_prebuilt",
    reason="after a retraction a decode server's penalties forget the answer so far",
    remove_when="SGLang counts what is there already",
)
def count_what_is_there_already(host: Callable[[Any], None], batch: Any) -> None:
    """Wrap `ScheduleBatch.prepare_for_prebuilt` of a decode server: count all but the last token.

    The next step reads the last token and counts it.
    """
    host(batch)
    _count_answers(batch, unread=1)


def _count_answers(batch: Any, unread: int = 0) -> None:
    """Count each request's tokens, except the last `unread`, from a count of zero."""
    penalizers = batch.sampling_info.penalizer_orchestrator.penalizers.values()
    for row, request in enumerate(batch.reqs):
        token_ids = list(request.output_ids)[: len(request.output_ids) - unread]
        if token_ids and is_penalised(request.sampling_params):
            _counted[request] = request.retraction_count, len(token_ids)
            for penalizer in penalizers:
                count(penalizer, row, torch.tensor(token_ids, device=batch.device))


def _uncounted(request: Any) -> list[int]:
    """The request's tokens that are not counted; all of them if the counts were reset."""
    retractions, counted = _counted.get(request, (0, 0))
    if retractions != request.retraction_count:
        counted = 0
    _counted[request] = request.retraction_count, len(request.output_ids)
    return list(request.output_ids[counted:])


def is_penalised(params: Any) -> bool:
    """Whether tokens must be counted; of other requests the whole history would be re-counted."""
    additive = params.frequency_penalty or params.presence_penalty or params.min_new_tokens
    return bool(additive) or params.repetition_penalty != 1


def count(penalizer: Any, row: int, token_ids: torch.Tensor) -> None:
    """Count tokens of one request, through views of its row. Shapes: token_ids [n]."""
    # Penalizers take one token of every request; a view turns the row into a batch of one.
    whole = {name: value for name, value in vars(penalizer).items() if torch.is_tensor(value)}
    vars(penalizer).update({name: value[row : row + 1] for name, value in whole.items()})
    for token_id in token_ids.split(1):
        penalizer.cumulate_output_tokens(token_id)
    vars(penalizer).update(whole)


@patch(
    When.ON_CPU,
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward",
    reason="SGLang hands a verification the penalties of each request's last token, which do "
    "not count the drafts before a row",
    remove_when="SGLang's verification counts drafts for penalties and min_new_tokens",
    upstream="https://github.com/sgl-project/sglang/pull/22049",
)
def keep_penalizers(host: Callable[[Any], Any], info: Any) -> Any:
    """Wrap `SamplingBatchInfo.copy_for_forward`, whose copy has only sums of the penalties."""
    copied = host(info)
    copied.penalizers = info.penalizer_orchestrator
    return copied


def penalizers_of_rows(
    penalizers: Any,
    requests: Sequence[Any],
    request: torch.Tensor,
    drafts: Sequence[tuple[int, ...]],
) -> Any:
    """SGLang's penalizers for rows in place of requests.

    Shapes: request [T], each row's index in the batch; drafts [T], those before it
    """
    of_rows = copy(penalizers)
    of_rows.penalizers = {kind: copy(one) for kind, one in penalizers.penalizers.items()}
    for penalizer in of_rows.penalizers.values():
        penalizer.filter(request)  # copies what each row's request has counted
        for row, (i, before) in enumerate(zip(request.tolist(), drafts, strict=True)):
            if before and is_penalised(requests[i].sampling_params):
                count(penalizer, row, torch.tensor(before))
    return of_rows
