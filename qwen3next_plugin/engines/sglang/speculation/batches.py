"""SGLang's batch and result of the step that has just ended, as rows of the MTP layer."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.eagle_utils import _eagle_prefill_tail_tokens

from qwen3next_plugin.mtp.rows import FinishedStep


def read(
    batch: ScheduleBatch, hidden_states: torch.Tensor, next_token_ids: torch.Tensor
) -> FinishedStep:
    """A step that read T tokens of N prompts. Shapes: hidden_states [T, D], next_token_ids [N]."""
    counts = batch.extend_lens
    starts = [0, *accumulate(counts)]
    token_ids = batch.input_ids.roll(-1).long()
    tails = _eagle_prefill_tail_tokens(batch, next_token_ids).long()
    token_ids[torch.tensor(starts[1:]) - 1] = tails
    return FinishedStep(
        requests=[request.rid for request in batch.reqs],
        starts=starts[:-1],
        firsts=batch.prefix_lens,
        scheduled=counts,
        counts=counts,
        prefilling=[request is batch.chunked_req for request in batch.reqs],
        continues=[False] * len(counts),
        token_ids=token_ids,
        hidden_states=hidden_states,
    )


def verified(
    batch: ScheduleBatch,
    result: GenerationBatchResult,
    widths: Sequence[int],
    lengths: Mapping[str, int],
) -> FinishedStep:
    """A verification of `widths` tokens of each of N requests, of `lengths` drafts of some."""
    counts = result.accept_lens.tolist()  # without the rejected drafts
    return _decoded(batch, result, batch.seq_lens.tolist(), widths, counts, lengths)


def decoded(batch: ScheduleBatch, result: GenerationBatchResult) -> FinishedStep:
    """A step of one token of each of N requests."""
    one_each = [1] * len(batch.reqs)
    return _decoded(batch, result, (batch.seq_lens - 1).tolist(), one_each, one_each, {})


def _decoded(
    batch: ScheduleBatch,
    result: GenerationBatchResult,
    firsts: list[int],
    widths: Sequence[int],
    counts: list[int],
    lengths: Mapping[str, int],
) -> FinishedStep:
    requests = [request.rid for request in batch.reqs]
    return FinishedStep(
        requests=requests,
        starts=[0, *accumulate(widths)][:-1],
        firsts=firsts,
        scheduled=[1 + lengths.get(request, 0) for request in requests],
        counts=counts,
        prefilling=[False] * len(requests),
        continues=[True] * len(requests),
        token_ids=result.next_token_ids.long(),
        hidden_states=result.logits_output.hidden_states,
    )
