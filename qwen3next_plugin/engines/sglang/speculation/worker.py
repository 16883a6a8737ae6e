"""SGLang's worker for NEXTN with our drafter, which drafts as many tokens as pay.

SGLang's own adaptive policy compares average accepted lengths with thresholds and does not know
what a step costs. Ours is the policy that vLLM's side has (mtp/policy.py). Here all requests of a
step draft the same number of tokens, because SGLang verifies the same number for each. A step in
which no request has a draft is SGLang's own decode step, as without NEXTN.
"""

import time
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from qwen3next_plugin.engines.sglang.speculation.drafter import Drafter


class Worker(EAGLEWorkerV2):
    """Serves the model with one chain of drafts for each request."""

    _draft_worker: Drafter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang's constructor creates its own class. Ours adds methods, and `begin` adds the rest.
        self._draft_worker.__class__ = Drafter
        self.left = self.entered = 0.0  # when the last step ended, and this one began
        self.verified = 0.0  # when the trunk's part ended
        self.first_drafts = 0.0  # seconds from the end of the last step's trunk to the step's end

    def init_cuda_graphs(self) -> None:
        """Add what is ours in the last call before SGLang serves."""
        super().init_cuda_graphs()
        self._draft_worker.begin()

    def activate_step_by_batch(self, batch_size: int) -> None:
        """Draft as many tokens in this step as were chosen after the last one."""
        steps = self._draft_worker.next_steps
        if steps == self.speculative_num_steps:
            return
        for worker in (self, self._draft_worker):
            worker.speculative_num_steps = steps
            worker.speculative_num_draft_tokens = steps + 1
        self._draft_worker._rebuild_topk1_chain_buffers()

    def forward_batch_generation(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Run a step: prompts, or further drafts and a verification, or a plain step."""
        self.entered = time.perf_counter()
        reads_prompts = batch.forward_mode.is_extend()
        if reads_prompts or self._draft_worker.steps(batch):
            result = super().forward_batch_generation(batch, *args, **kwargs)
        else:
            result = self._decode(batch)
            self._draft_worker._draft_extend_for_decode(batch, result)
        self.left = time.perf_counter()
        if not reads_prompts:
            self.first_drafts = self.left - self.verified
        return result

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """Verify the drafts."""
        began = time.perf_counter()
        result = super().verify(batch, *args, **kwargs)
        self._learn(batch, result, began)
        return result

    def _decode(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Run the step that SGLang would run without NEXTN, its plain sampler included.

        The result has the form of a verification without drafts. Changes the batch, which SGLang
        restores after the step.
        """
        began = time.perf_counter()
        seq_lens = batch.seq_lens
        table = self.req_to_token_pool.req_to_token
        batch.input_ids = batch.spec_info.bonus_tokens.long()
        batch.out_cache_loc = table[batch.req_pool_indices, seq_lens].long()
        batch.seq_lens, batch.seq_lens_cpu = seq_lens + 1, batch.seq_lens_cpu + 1
        batch.seq_lens_sum = batch.spec_info = None
        result = self.target_worker.forward_batch_generation(
            batch, capture_hidden_mode=CaptureHiddenMode.FULL
        )
        result.accept_lens = torch.ones_like(seq_lens, dtype=torch.int32)
        result.new_seq_lens, batch.seq_lens = batch.seq_lens, seq_lens
        result.speculative_num_draft_tokens = 1
        result.next_draft_input = EagleDraftInput(bonus_tokens=result.next_token_ids)
        if batch.return_logprob:  # one row for each token, as of a verification
            output = result.logits_output
            output.next_token_logprobs = output.next_token_logprobs[:, None]
        self._learn(batch, result, began)
        return result

    def _learn(self, batch: ScheduleBatch, result: GenerationBatchResult, began: float) -> None:
        """Let the drafter learn from a step of which the trunk's part has just ended."""
        self.verified = time.perf_counter()
        self._draft_worker.learn(
            batch,
            result,
            # with the scheduler's work since the last step, which each step has
            step_seconds=self.entered - self.left + self.verified - began,
            draft_seconds=self.first_drafts + began - self.entered,
        )
