"""Penalties and min_new_tokens under drafts: a row's penalties count the drafts before the row.

SGLang penalises every row of a verification like that of the request's last token.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch

from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.engines.sglang.repairs.penalties import count, is_penalised


@patch(
    When.ON_CPU,
    "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.copy_for_forward",
    reason="SGLang hands a verification the penalties of each request's last token, which do "
    "not count the drafts before a row",
    remove_when="SGLang's verification counts drafts for penalties and min_new_tokens",
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
