"""SGLang's worker for NEXTN with our drafter, which chooses the fastest number of drafts.

SGLang's own adaptive policy compares average accepted lengths with thresholds and ignores what a
step costs. Ours is mtp/policy.py, as under vLLM, with a length for each
request. A step in which no request has a draft is SGLang's own decode step: for SGLang its batch
has no drafts, so it prepares, runs and finishes the step as without NEXTN.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from qwen3next_plugin.engines.sglang.speculation.drafter import Drafter


class Worker(EAGLEWorkerV2):
    """Serves the model with one chain of drafts for each request."""

    drafter: Drafter  # built on SGLang's draft worker, when that is ready

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left = self.entered = 0.0  # when the last step ended, and this one began
        self.verified = 0.0  # when the trunk's part ended
        self.first_drafts = 0.0  # seconds from the end of the last step's trunk to the step's end

    def init_cuda_graphs(self) -> None:
        """Add what is ours in the last call before SGLang serves."""
        super().init_cuda_graphs()
        self.drafter = Drafter(
            self.draft_worker.draft_runner, self.req_to_token_pool, self.speculative_num_steps
        )

    def choose_step(self, batch: ScheduleBatch) -> None:
        """Before a decode step is prepared: verify drafts if there are any, else decode plainly.

        Drops drafts if the pool has no room for a verification. SGLang would retract requests, and
        abort the last one, although a plain step needs only one token per request.
        """
        if self.drafter.has_drafts(batch):
            batch.spec_algorithm = self.speculative_algorithm
            if batch.check_decode_mem():
                return
            self.drafter.drop(batch)
        batch.spec_algorithm = SpeculativeAlgorithm.NONE
        info = batch.sampling_info  # left over from steps with drafts
        info.acc_additive_penalties = info.acc_scaling_penalties = None
        for request in batch.reqs:
            kv = request.kv
            if kv.kv_allocated_len > kv.kv_committed_len:  # reserved by a verification
                batch.tree_cache.free_kv_row(kv, [(kv.kv_committed_len, kv.kv_allocated_len)])
                kv.kv_allocated_len = kv.kv_committed_len

    def forward_batch_generation(
        self,
        batch: ScheduleBatch,
        on_publish: Callable[[torch.Tensor], None] | None = None,
        grammar_barrier: Any = None,
        pp_proxy_tensors: Any = None,
    ) -> GenerationBatchResult:
        """Run a step: prompts, or further drafts and a verification, or a plain step.

        SGLang's own does this around its draft worker. `on_publish` receives the lengths that the
        next step begins with.
        """
        self.entered = time.perf_counter()
        if reads_prompts := batch.forward_mode.is_extend():
            result = self._read_prompts(batch, on_publish)
        elif not batch.spec_algorithm.is_none():
            result = self._verify(batch, on_publish, grammar_barrier)
        else:
            result = self._decode(batch)
        self.left = time.perf_counter()
        if not reads_prompts:
            self.first_drafts = self.left - self.verified
        return result

    def _read_prompts(self, batch: ScheduleBatch, on_publish: Any) -> GenerationBatchResult:
        result = self._run_trunk(batch)
        result.new_seq_lens = batch.seq_lens
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = self.drafter.after_prompts(
            batch, result.logits_output.hidden_states, result.next_token_ids
        )
        return result

    def _verify(
        self, batch: ScheduleBatch, on_publish: Any, grammar_barrier: Any
    ) -> GenerationBatchResult:
        """Extend the first drafts to chains, and verify them."""
        chains = batch.spec_info = self.drafter.draft(batch)
        self.speculative_num_draft_tokens = chains.draft_token_num
        began = time.perf_counter()
        result = self.verify(batch, grammar_barrier=grammar_barrier)
        seconds = self._seconds(began)
        if on_publish is not None:
            on_publish(result.new_seq_lens)
        result.next_draft_input = self.drafter.after_verification(
            batch, result, chains.widths, **seconds
        )
        chains.widen(result, hidden_states=any(r.return_hidden_states for r in batch.reqs))
        return result

    def _decode(self, batch: ScheduleBatch) -> GenerationBatchResult:
        """Run the model as SGLang does without NEXTN, its plain sampler included."""
        began = time.perf_counter()
        drafts = batch.spec_info
        batch.input_ids, batch.spec_info = drafts.bonus_tokens.long(), None
        result = self._run_trunk(batch)
        drafts.bonus_tokens = result.next_token_ids
        for request in batch.reqs:  # SGLang's statistics: a verification of no drafts
            request.spec_verify_ct += 1
            request.update_spec_correct_drafts_histogram(0)
        more = self.drafter.after_plain_step(batch, result, **self._seconds(began))
        batch.spec_info = more or drafts
        return result

    def _run_trunk(self, batch: ScheduleBatch) -> GenerationBatchResult:
        return self.target_worker.forward_batch_generation(
            batch, capture_hidden_mode=CaptureHiddenMode.FULL
        )

    def _seconds(self, began: float) -> dict[str, float]:
        """Seconds of the step whose trunk part has just ended, and of its drafting."""
        self.verified = time.perf_counter()
        return {
            # includes the scheduler's work since the last step
            "step_seconds": self.entered - self.left + self.verified - began,
            "draft_seconds": self.first_drafts + began - self.entered,
        }
