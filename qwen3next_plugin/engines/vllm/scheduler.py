"""vLLM's scheduler with a budget of seconds for a step, metrics and a log line on drafting.

vLLM has a setting for the class (`--scheduler-cls`); flags.py chooses this one on CPUs. Scheduling
changes for streaming input with drafts, and if prompts are read while others wait (pacing.py).
"""

import time
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler as HostScheduler
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from qwen3next_plugin import env
from qwen3next_plugin.engines.pacing import LongestStep, Pacing, Prompt
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.metrics import scheduler_board
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.prefix_pages import SharedPrefixes, Units, message_ends
from qwen3next_plugin.mtp.metrics import LogLine

logger = init_logger(LOGGER)

COUNT_EVERY = 0.1  # seconds between counts of state pages: each looks at every block of a request


LOOKED_UP = 32  # waiting prompts whose cached prefix is looked up before a step


@dataclass(frozen=True, slots=True)
class Step:
    """What a step does."""

    began: float
    rows: int  # that decode
    tokens: int  # of prompts
    context: float  # mean position of these
    chunks: list[tuple[Request, int, int]]  # of prompts: from a position to another


@override(
    "vllm.v1.core.sched.scheduler.Scheduler.need_mamba_block_aligned_split",
    "vllm.v1.core.sched.scheduler.Scheduler.max_num_scheduled_tokens",
    reason="that method is called, and lets a chunk end within a block, if these say so",
    remove_when="`_mamba_block_aligned_split` is not overridden",
)
class Scheduler(HostScheduler):
    """Schedules as vLLM does, with a budget for a step and with metrics."""

    need_mamba_block_aligned_split: bool
    max_num_scheduled_tokens: int
    mamba_partial_cache_hit: bool

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # whatever the host passes
        self.board = scheduler_board(vllm_config)
        self.log_line = LogLine(self.board) if vllm_config.num_speculative_tokens else None
        self.logged = self.counted = time.monotonic()
        self.longest = LongestStep()
        self.step: Step | None = None
        chunked = self.scheduler_config.enable_chunked_prefill
        self.pacing = Pacing(env.step_seconds() if chunked else 0.0)
        self.shares: dict[str, int] | None = None  # tokens of prompts in this step; None: any
        self.refused: set[str] = set()  # waiting prompts that vLLM had no room for
        # Engines that share experts step together, so other engines' requests may wait, too.
        parallel_config = vllm_config.parallel_config
        self.together = (
            parallel_config.data_parallel_size > 1 and parallel_config.enable_expert_parallel
        )
        self.aligned = self.need_mamba_block_aligned_split
        self.need_mamba_block_aligned_split = True  # so vLLM calls our method for chunks
        self._pad_no_row(vllm_config)
        self.units: Units | None = None
        if self.mamba_partial_cache_hit:
            self.mamba_shared_prefix_checkpoint = True
            self.mamba_partial_cache_hit = False  # the end of a prompt is one of our places
            prefixes = SharedPrefixes(
                self.hash_block_size,
                self.block_size,
                message_ends(vllm_config.model_config),
                with_drafts=self.use_eagle_block_drop,
            )
            self.units = Units(self.kv_cache_manager, prefixes)

    @override(
        "vllm.v1.core.sched.scheduler.Scheduler.dynamic_sd_lookup",
        reason="vLLM pads a new row without a draft to the rows of a GPU's graph: on a CPU a "
        "step computes them all",
        remove_when="vLLM pads only where a graph is replayed",
    )
    def _pad_no_row(self, vllm_config: VllmConfig) -> None:
        """Claim that drafts depend on the number of requests: then vLLM pads no undrafted row."""
        drafts = vllm_config.speculative_config
        if drafts is not None and not drafts.num_speculative_tokens_per_batch_size:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Schedule as vLLM does, but read no more prompt tokens than fit the budget."""
        began = time.monotonic()
        if self.units is not None:
            self.units.begin_step()
        first = self._share_step()
        output = super().schedule(throttle_prefills)
        deferred = self.units is not None and self.units.defer()
        if first is not None and first not in output.num_scheduled_tokens and not deferred:
            self.refused.add(first)
        self.step = self._describe(output, began)
        return output

    def _share_step(self) -> str | None:
        """Give each prompt its share of the next step; returns the first prompt if shares apply."""
        if self.finished_req_ids:
            self.refused.clear()  # there is room again
        rows = sum(_rest(request) == 1 for request in self.running)
        requests = [request for request in self.running if _rest(request) > 1]
        waiting = self._may_begin()
        prompts = [Prompt(_rest(one), one.num_computed_tokens) for one in requests]
        prompts += [self._prompt(one, i < LOOKED_UP) for i, one in enumerate(waiting)]
        if self.policy == SchedulingPolicy.PRIORITY:
            self.pacing.oldest_had_its_turn = False  # use vLLM's order
        decoding = max(rows, int(self.together))
        shares = self.pacing.shares(prompts, decoding, self.max_num_scheduled_tokens - rows)
        if shares is None:
            # Prompts that were not ready may not begin in this step either.
            unready = rows and (self.waiting or self.kv_holding_waiting)
            self.shares = {} if self.pacing.seconds and unready else None
            return None
        requests += waiting
        self.shares = {
            one.request_id: share for one, share in zip(requests, shares, strict=True) if share
        }
        first = requests[self.pacing.first]
        if first in waiting and first not in self.kv_holding_waiting:
            self.waiting.remove_request(first)
            self.waiting.prepend_request(first)
        return first.request_id

    def _may_begin(self) -> list[Request]:
        """Waiting requests that may begin now; if one row is free, only the first of them."""
        free = self.max_num_running_reqs - len(self.running)
        if free <= 0 or self._pause_state != PauseState.UNPAUSED:
            return []
        ready = (
            request
            for request in chain(self.kv_holding_waiting, self.waiting)
            if not self._is_blocked_waiting_status(request.status)
            and request.request_id not in self.refused
        )
        in_order = free == 1 or self.policy == SchedulingPolicy.PRIORITY
        return list(islice(ready, 1 if in_order else None))

    def _prompt(self, request: Request, look_up: bool) -> Prompt:
        """A waiting request's prompt, behind its cached prefix if that is looked up."""
        computed = request.num_computed_tokens
        if look_up and not computed:
            computed = self.kv_cache_manager.get_computed_blocks(request)[1]
        return Prompt(request.num_tokens - computed, computed)

    @override(
        "vllm.v1.core.sched.scheduler.Scheduler._mamba_block_aligned_split",
        reason="the only method that vLLM asks how long a request's chunk may be; it bounds a "
        "step by tokens, which take more time the longer the context",
        remove_when="vLLM bounds the time of a step",
    )
    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, *computed: int, **named: int
    ) -> int:
        """The length of a request's next chunk, which ends no later than at the next cached state.

        A page can continue at any token, so a share shorter than a block may end within one, as
        chunks do in vLLM if a block is longer than its largest chunk.
        """
        if self.units is not None:
            start = request.num_computed_tokens + sum(computed) + sum(named.values())
            request.shared_prefix_boundary = self.units.prefixes.next_place(request, start)
        most = largest = self.max_num_scheduled_tokens
        if self.shares is not None and _rest(request) > 1 and not self._reads_whole_images(request):
            num_new_tokens = min(num_new_tokens, self.shares.get(request.request_id, 0))
            largest = min(most, self.cache_config.block_size - 1)
        if not num_new_tokens or not self.aligned:
            return num_new_tokens
        self.max_num_scheduled_tokens = largest
        try:
            return super()._mamba_block_aligned_split(request, num_new_tokens, *computed, **named)
        finally:
            self.max_num_scheduled_tokens = most

    @override(
        "vllm.v1.core.sched.scheduler.Scheduler._get_local_prefix_cache_hit",
        "vllm.v1.core.sched.scheduler.Scheduler.mamba_partial_cache_hit",
        "vllm.v1.core.sched.scheduler.Scheduler.mamba_shared_prefix_checkpoint",
        reason="vLLM ends chunks at the last unit of each prompt, a step more, and within a block "
        "at no other place",
        remove_when="a scheduler can say where chunks end",
    )
    def _get_local_prefix_cache_hit(
        self, request: Request, *most: Any, **named: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Look up a prompt's prefix as vLLM does, and choose where its chunks end.

        vLLM 0.33 also says how much of it may be taken from the cache at most.
        """
        found = super()._get_local_prefix_cache_hit(request, *most, **named)
        blocks, cached, junction, diverged = found
        if self.units is None or not self.kv_cache_manager.prefix_cache_lookup_enabled(request):
            return blocks, cached, junction, diverged
        if not self.running and not self.units.fits(request, cached):
            blocks, cached, diverged = self.kv_cache_manager.empty_kv_cache_blocks, 0, False
        self.units.prefixes.foresee(request, cached, junction)
        return blocks, cached, self.units.prefixes.next_place(request, cached), diverged

    def _reads_whole_images(self, request: Request) -> bool:
        """Whether vLLM cuts a chunk before an image that it would split, perhaps to nothing."""
        return request.has_encoder_inputs and self.scheduler_config.disable_chunked_mm_input

    def _describe(self, output: SchedulerOutput, began: float) -> Step:
        """What this step does. Its requests count its tokens as computed already."""
        rows = tokens = positions = 0
        chunks = []
        for name, count in output.num_scheduled_tokens.items():
            request = self.requests[name]
            start = request.num_computed_tokens - count
            if request.num_tokens - start > 1:
                tokens += count
                positions += count * (start + count // 2)
                chunks.append((request, start, start + count))
            else:
                rows += 1
        return Step(began, rows, tokens, positions / max(1, tokens), chunks)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Learn what the step took and update as vLLM does, then write metrics and the log line."""
        now = time.monotonic()
        if (step := self.step) is not None and (step.rows or step.tokens):
            seconds = now - step.began
            self.pacing.costs.observe(step.rows, step.tokens, step.context, seconds)
            if self.log_stats:
                self.board.set("longest_step_seconds", [self.longest.observe(now, seconds)])
        if self.units is not None and step is not None:
            for request, start, end in step.chunks:
                self.units.enter(request, start, end)
        self.step = None
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.log_stats:
            self._count(now)
            self._log(now)
        return outputs

    def _handle_stopped_request(self, request: Request) -> bool:
        """Let the next piece of streaming input begin where it would without drafts.

        A step may have accepted drafts after the token that ended the answer, and an answer's last
        token is not read before the next piece.
        """
        if request.resumable:
            request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        return super()._handle_stopped_request(request)

    def _count(self, now: float) -> None:
        """Count the state pages now and then, and when nothing runs any more."""
        if now - self.counted >= COUNT_EVERY or not self.running:
            self.counted = now
            self.board.set("state_pages", [self.state_pages()])

    def state_pages(self) -> int:
        """State pages that requests hold, by vLLM's accounting; cached pages are free."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        groups = self.kv_cache_config.kv_cache_groups
        return sum(
            len(group.layer_names) * sum(not block.is_null for block in blocks)
            for manager, group in zip(managers, groups, strict=True)
            if isinstance(group.kv_cache_spec, MambaSpec)
            for blocks in manager.req_to_blocks.values()
        )

    def _log(self, now: float) -> None:
        """Log at the interval of vLLM's statistics, and only if something was decoded."""
        if self.log_line and now - self.logged >= envs.VLLM_LOG_STATS_INTERVAL:
            self.logged = now
            if text := self.log_line.text():
                logger.info(text)


def _rest(request: Request) -> int:
    """Tokens to read until the next one is sampled: 1 if it decodes."""
    return request.num_tokens - request.num_computed_tokens
