"""vLLM's scheduler, which also counts the state pages in use and logs a line on drafting.

A scheduler class is a setting of vLLM's (`--scheduler-cls`); flags.py chooses this one with MTP.
It schedules nothing differently.
"""

import time
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler as HostScheduler
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.outputs import ModelRunnerOutput

from qwen3next_plugin.engines.vllm import metrics as figures
from qwen3next_plugin.engines.vllm.names import logger
from qwen3next_plugin.mtp.metrics import LogLine


class Scheduler(HostScheduler):
    """Serves with MTP."""

    def __init__(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)  # the host's own, whatever they are
        self.board = figures.of_scheduler(vllm_config)
        self.log_line = LogLine(self.board)
        self.logged = time.monotonic()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """As the host's; then the figures, where statistics are wanted."""
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.log_stats:
            self.board.set("state_pages", [self.state_pages()])
            self._log()
        return outputs

    def state_pages(self) -> int:
        """Pages that requests hold, by the engine's own accounting; those only cached are free."""
        managers = self.kv_cache_manager.coordinator.single_type_managers
        groups = self.kv_cache_config.kv_cache_groups
        return sum(
            len(group.layer_names) * sum(not block.is_null for block in blocks)
            for manager, group in zip(managers, groups, strict=True)
            if isinstance(group.kv_cache_spec, MambaSpec)
            for blocks in manager.req_to_blocks.values()
        )

    def _log(self) -> None:
        """In the rhythm of the host's own statistics, and like those only if there is news."""
        now = time.monotonic()
        if now - self.logged >= envs.VLLM_LOG_STATS_INTERVAL:
            self.logged = now
            if text := self.log_line.text():
                logger.info(text)
