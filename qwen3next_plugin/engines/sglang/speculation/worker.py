"""SGLang's worker for NEXTN with our drafter, which drafts as many tokens as pay.

SGLang's own adaptive policy compares average accepted lengths with thresholds and does not know
what a step costs. Ours is the policy that vLLM's side has (mtp/policy.py). Here all requests of a
step draft the same number of tokens, because SGLang verifies the same number for each.
"""

import time
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from qwen3next_plugin.engines.sglang.speculation.drafter import Drafter


class Worker(EAGLEWorkerV2):
    """Serves the model with one chain of drafts for each request."""

    _draft_worker: Drafter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang's constructor creates its own class. Ours adds methods, and `begin` adds the rest.
        self._draft_worker.__class__ = Drafter
        self.entered = self.verified = 0.0  # when the step began, when its verification ended
        self.first_drafts = 0.0  # seconds from the end of a verification to the end of its step

    def init_cuda_graphs(self) -> None:
        """Add what is ours in the last call before SGLang serves."""
        super().init_cuda_graphs()
        self._draft_worker.begin()

    def activate_step_by_batch(self, batch_size: int) -> None:
        """Draft as many tokens in this step as were chosen after the last one."""
        steps = self._draft_worker.next_steps
        for worker in (self, self._draft_worker):
            worker.speculative_num_steps = steps
            worker.speculative_num_draft_tokens = steps + 1
        self._draft_worker._rebuild_topk1_chain_buffers()

    def forward_batch_generation(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """Run a step, timed: further drafts, verification, first drafts of the next step."""
        self.entered = self.verified = time.perf_counter()
        result = super().forward_batch_generation(batch, *args, **kwargs)
        if self.verified > self.entered:  # no prompt was read
            self.first_drafts = time.perf_counter() - self.verified
        return result

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """Verify the drafts, timed, and let the drafter learn from it."""
        began = time.perf_counter()
        self._draft_worker.see(batch.spec_info.draft_token)
        result = super().verify(batch, *args, **kwargs)
        self.verified = time.perf_counter()
        self._draft_worker.learn(
            batch,
            result,
            step_seconds=self.verified - began,
            draft_seconds=self.first_drafts + began - self.entered,
        )
        return result
