"""Ends a node, with an error, when the server loses another node."""

import os
from collections.abc import Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_inner_dp_world_group
from vllm.logger import init_logger

from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.patches import When, patch
from qwen3next_plugin.extras.fleet.nodes import end_together, meet_at

logger = init_logger(LOGGER)

OWN_ADDRESS = "VLLM_HOST_IP"  # the variable with this node's address


def complete_nodes(vllm_config: VllmConfig) -> None:
    """Choose this node's address."""
    parallel_config = vllm_config.parallel_config
    if parallel_config.nnodes > 1:
        meet_at("--master-addr", parallel_config.master_addr, OWN_ADDRESS)


@patch(
    When.IN_WORKER,
    "vllm.v1.worker.cpu_worker.CPUWorker.init_device",
    reason="when a node ends, vLLM's first node notices at its next step, the others never",
    remove_when="vLLM ends all nodes of a server when one ends",
)
def end_with_other_nodes(host: Callable[[Any], None], worker: Any) -> None:
    """Around `init_device`: end this worker, and so its node, when another node's worker ends."""
    host(worker)
    parallel_config = worker.parallel_config
    if parallel_config.nnodes_within_dp > 1:
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
