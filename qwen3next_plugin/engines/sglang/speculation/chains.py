"""Chains: the passes of the MTP layer over a batch, and the drafts that they make."""

from copy import copy
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import (
    CaptureHiddenMode,
    ForwardBatch,
    ForwardMode,
)
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput
from sglang.srt.speculative.eagle_utils import per_step_draft_out_cache_loc
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.mtp.pending import Row


class Chains(EagleDraftWorker):
    """SGLang's draft worker with our chains."""

    def _forward(self, batch: ScheduleBatch, fed: list[Row]) -> torch.Tensor:
        """Run the MTP layer over what it reads of rows; returns [drafting, D], the last of each."""
        batch = copy(batch)
        batch.sampling_info = copy(batch.sampling_info)
        batch.spec_algorithm = self.speculative_algorithm
        tokens = [row.fed for row in fed if row.fed is not None]
        firsts, counts = [part.first for part in tokens], [len(part) for part in tokens]
        batch.reqs = [batch.reqs[row.index] for row in fed]
        batch.req_pool_indices = batch.req_pool_indices[[row.index for row in fed]]
        table = self.req_to_token_pool.req_to_token
        slots = [
            table[request, part.first : part.end]
            for request, part in zip(batch.req_pool_indices.tolist(), tokens, strict=True)
        ]
        batch.input_ids = torch.cat([part.token_ids for part in tokens])
        batch.out_cache_loc = torch.cat(slots).long()
        batch.spec_info = EagleDraftExtendInput(
            hidden_states=torch.cat([part.hidden_states for part in tokens]), num_tokens_per_req=1
        )
        batch.prefix_lens, batch.extend_lens = firsts, counts
        batch.extend_num_tokens = sum(counts)
        batch.seq_lens = batch.seq_lens_cpu = torch.tensor([part.end for part in tokens])
        batch.seq_lens_sum = None
        batch.forward_mode = ForwardMode.DRAFT_EXTEND_V2
        forward_batch = ForwardBatch.init_new(
            batch,
            self.draft_runner,
            capture_hidden_mode=CaptureHiddenMode.FULL,
            return_hidden_states_before_norm=False,
        )
        self.draft_runner.model.see(batch.input_ids)
        hidden_states = self.draft_runner.forward(forward_batch).logits_output.hidden_states
        ends = torch.tensor(counts).cumsum(0) - 1  # [fed]
        return hidden_states[ends[[row.draft > 0 for row in fed]]]

    def draft_forward(self, forward_batch: ForwardBatch) -> tuple[Any, ...]:
        """Extend each request's first draft to a chain; returns what SGLang's method returns."""
        spec_info: EagleDraftInput = forward_batch.spec_info
        steps, N = self.speculative_num_steps, forward_batch.batch_size
        slots = per_step_draft_out_cache_loc(forward_batch.out_cache_loc, N, 1, steps)
        tokens = [spec_info.topk_index]  # [N, 1] each
        for i in range(steps - 1):
            forward_batch.input_ids = tokens[-1].flatten()
            forward_batch.out_cache_loc = slots[i]
            backend = self.draft_attn_backend.attn_backends[i]
            with forward_context(ForwardContext(attn_backend=backend), forward_batch=forward_batch):
                output = self.draft_runner.forward(forward_batch).logits_output
            spec_info.hidden_states = output.hidden_states
            tokens.append(self.draft_runner.model.get_top_tokens(output.hidden_states)[:, None])
            forward_batch.positions.add_(1)
        return (
            self._topk1_parents_prealloc[:N],
            self._topk1_score_indices_prealloc[:N],
            torch.cat(tokens, dim=1),
            None,
        )

    def _drafts(
        self, bonus_tokens: torch.Tensor, drafting: list[Row], hidden_states: torch.Tensor
    ) -> EagleDraftInput:
        """What SGLang carries to the next step: the first drafts, or zeros where there is none.

        Shapes: bonus_tokens [N], hidden_states [drafting, D] after each one's last token
        """
        N, D = len(bonus_tokens), hidden_states.shape[1]
        draft = EagleDraftInput(
            bonus_tokens=bonus_tokens,
            topk_index=torch.zeros(N, 1, dtype=torch.int64),
            topk_p=torch.ones(N, 1),
            hidden_states=hidden_states.new_zeros(N, D),
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
        if drafting:
            index = [row.index for row in drafting]
            draft.topk_index[index, 0] = self.draft_runner.model.get_top_tokens(hidden_states)
            draft.hidden_states[index] = hidden_states
        return draft
