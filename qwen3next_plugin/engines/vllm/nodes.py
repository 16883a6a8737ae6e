"""A node of a server that has lost another: it ends, in failure."""

import os
from collections.abc import Callable
from typing import Any

from vllm.config import ParallelConfig
from vllm.distributed.parallel_state import get_inner_dp_world_group
from vllm.logger import init_logger

from qwen3next_plugin.engines.nodes import end_together
from qwen3next_plugin.engines.vllm.names import LOGGER, OWN_ADDRESS
from qwen3next_plugin.engines.vllm.patches import When, patch

logger = init_logger(LOGGER)


def end_with_other_nodes(parallel_config: ParallelConfig) -> None:
    """End this worker, and so the node, when a worker of another node ends.

    vLLM's first node notices at its next step, the others never.
    """
    end_together(
        get_inner_dp_world_group(),
        ranks_here=parallel_config.local_world_size,
        first_node=parallel_config.node_rank_within_dp == 0,
        own=os.environ[OWN_ADDRESS],
        lost=_end,
    )


@patch(
    When.CONFIGURED,
    "vllm.v1.executor.multiproc_executor.MultiprocExecutor.start_worker_monitor",
    reason="a headless node whose worker has ended exits with 0",
    remove_when="vLLM exits with another code",
)
def fail_with_a_worker(host: Callable[..., None], executor: Any, inline: bool = False) -> None:
    """Around `start_worker_monitor`, which in a headless node returns when a worker has ended.

    The node would exit with 0.
    """
    host(executor, inline)
    if inline:
        raise SystemExit("A worker has ended, and so does this node; the log above says why")


def _end(line: str) -> None:
    logger.error("qwen3next_plugin: %s", line)
    os._exit(1)  # the main thread may wait for the other node
