"""vLLM's scheduler, which also counts the state pages in use and logs a line on drafting.

vLLM has a setting for the class (`--scheduler-cls`); flags.py chooses this one with MTP.
Scheduling itself changes for streaming input alone.
"""

import time
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as HostScheduler
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from qwen3next_plugin.engines.vllm.metrics import scheduler_board
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.mtp.metrics import LogLine

logger = init_logger(LOGGER)

COUNT_EVERY = 0.1  # seconds between counts of state pages: each looks at every block of a request


class Scheduler(HostScheduler):
    """Schedules as vLLM does, with metrics of MTP."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # whatever the host passes
        self.board = scheduler_board(vllm_config)
        self.log_line = LogLine(self.board)
        self.logged = self.counted = time.monotonic()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Update as vLLM does, then write metrics and the log line if statistics are on."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.log_stats:
            now = time.monotonic()
            self._count(now)
            self._log(now)
        return outputs

    def _handle_stopped_request(self, request: Request) -> bool:
        """Let the next piece of streaming input begin where it does without drafts.

        A step may have accepted drafts behind the token that ended the answer, and the last token
        of an answer is not read before the next piece.
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
        if now - self.logged >= envs.VLLM_LOG_STATS_INTERVAL:
            self.logged = now
            if text := self.log_line.text():
                logger.info(text)
