"""SGLang's worker for NEXTN with our drafter, and with drafts as long as they pay.

SGLang's own adaptive policy is an average of accepted lengths with thresholds, blind to what a step
takes. Ours is the one that the vLLM side has (mtp/policy.py), here with one length for all
requests of a step, since SGLang verifies the same number of tokens of each.
"""

import time
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.managers.utils import GenerationBatchResult
from sglang.srt.runtime_context import get_parallel
from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

from qwen3next_plugin.engines.sglang.speculation.drafter import Drafter
from qwen3next_plugin.mtp.policy import make_policy


class Worker(EAGLEWorkerV2):
    """Drafts one chain a request."""

    _draft_worker: Drafter

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # SGLang names its draft worker's class in its own constructor; ours adds methods only.
        self._draft_worker.__class__ = Drafter
        self.policy = make_policy(
            self.target_worker.model_runner.model.config,
            self.speculative_num_steps,
            uniform=True,
        )
        self.entered = self.verified = 0.0  # when the step began, and when its verification ended
        self.first_drafts = 0.0  # seconds
        self.met: set[str] = set()  # requests of the last step

    def init_cuda_graphs(self) -> None:
        """The last that SGLang does before it serves."""
        super().init_cuda_graphs()
        self._draft_worker.begin()

    def activate_step_by_batch(self, batch_size: int) -> None:
        """Draft in this step what was decided after the one before."""
        steps = self._draft_worker.next_steps
        for worker in (self, self._draft_worker):
            worker.speculative_num_steps = steps
            worker.speculative_num_draft_tokens = steps + 1
        self._draft_worker._rebuild_topk1_chain_buffers()

    def forward_batch_generation(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> Any:
        """As the host's: draft on, verify, first drafts of the next step; each timed."""
        self.entered = self.verified = time.perf_counter()
        result = super().forward_batch_generation(batch, *args, **kwargs)
        if self.verified > self.entered:  # no prompt was read
            self.first_drafts = time.perf_counter() - self.verified
        return result

    def verify(self, batch: ScheduleBatch, *args: Any, **kwargs: Any) -> GenerationBatchResult:
        """As the host's; then learn from it and decide how much the next step drafts."""
        began = time.perf_counter()
        self._draft_worker.see(batch.spec_info.draft_token)
        drafted = batch.spec_info.draft_token_num - 1
        result = super().verify(batch, *args, **kwargs)
        self.verified = time.perf_counter()
        rids = [request.rid for request in batch.reqs]
        if rids:
            if self.met.issuperset(rids):  # no step in between that read a prompt
                drafting = self.first_drafts + began - self.entered
                self._time(len(rids), drafted, self.verified - began, drafting)
            self._learn(rids, drafted, result.accept_lens.tolist())
            self._draft_worker.next_steps = self._decide(rids)
        return result

    def _time(self, batch: int, drafted: int, verifying: float, drafting: float) -> None:
        self.policy.observe_step(batch, batch * (drafted + 1), verifying)
        if drafted:
            self.policy.observe_draft(batch, drafted, drafting)

    def _learn(self, rids: list[str], drafted: int, accepted: list[int]) -> None:
        for rid, tokens in zip(rids, accepted, strict=True):
            self.policy.observe_verify(rid, drafted, tokens - 1)
        for rid in self.met - set(rids):
            self.policy.forget(rid)
        self.met = set(rids)

    def _decide(self, rids: list[str]) -> int:
        """Drafts of each request in the next step; the first rank's clock decides for all."""
        steps = max(self.policy.lengths(rids))
        group = get_parallel().tp_group
        if group.world_size > 1:
            steps = int(group.broadcast(torch.tensor([steps]), src=0))
        return steps
