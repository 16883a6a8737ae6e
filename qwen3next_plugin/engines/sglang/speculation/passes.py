"""Passes of the MTP layer: SGLang's layer and attention, without its runner around them.

The runner prepares for graphs, padding and data parallelism, which chains on a CPU do not need; on
a small model that takes as long as the layer.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_model
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput

from qwen3next_plugin.mtp.images import Axes, mrope_positions


def locate(
    table: torch.Tensor, requests: torch.Tensor, firsts: Sequence[int], counts: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and KV locations of `counts` tokens of each request from position `firsts` on.

    Shapes: table [requests, positions], requests [N] in the table, returns [T] each
    """
    spans = zip(firsts, counts, strict=True)
    positions = torch.tensor([at for first, n in spans for at in range(first, first + n)])
    row = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    return positions, table[requests[row], positions].long()


def run_layer(
    runner: Any,
    *,
    requests: torch.Tensor,
    counts: Sequence[int],
    positions: torch.Tensor,
    locations: torch.Tensor,
    token_ids: torch.Tensor,
    hidden_states: torch.Tensor,
    axes: Sequence[Axes | None],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the MTP layer over `counts` consecutive tokens of each request.

    Returns what drafts come from, and what the next pass reads.

    Shapes:
        requests [N] in the table of KV locations; positions, locations, token_ids [T],
        hidden_states [T, D] or [T, hc·D], axes [N], of requests with images; returns [T, D], and
        as hidden_states
    """
    backend, model = runner.attn_backend, runner.model
    batch = ForwardBatch(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(counts),
        input_ids=token_ids,
        positions=positions,
        req_pool_indices=requests,
        seq_lens=positions + 1,
        seq_lens_sum=0,  # no backend of ours reads it
        out_cache_loc=locations,
        spec_info=EagleDraftExtendInput(hidden_states=hidden_states),
        mrope_positions=mrope_positions(axes, positions, counts),
    )
    if len(token_ids) > len(counts):
        lengths = torch.tensor(counts)
        ends = lengths.cumsum(0)
        batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        batch.seq_lens = batch.seq_lens[ends - 1]
        batch.extend_seq_lens, batch.extend_start_loc = lengths.int(), (ends - lengths).int()
    with (
        get_model().override(shared_experts=model.shared_experts_config),
        forward_context(ForwardContext(attn_backend=backend), forward_batch=batch),
    ):
        backend.init_forward_metadata(batch)
        states: tuple[torch.Tensor, torch.Tensor] = model.states(token_ids, positions, batch)
        return states
