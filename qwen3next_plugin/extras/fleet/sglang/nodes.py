"""Ends a node, with an error, when the server loses another node."""

import os
import signal
from collections.abc import Callable
from typing import Any

from qwen3next_plugin.config.errors import ConfigError
from qwen3next_plugin.engines.sglang.names import is_ours, logger
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.fleet.nodes import end_together, meet_at

OWN_ADDRESS = "SGLANG_HOST_IP"  # the variable with this node's address


def complete_nodes(server_args: Any) -> None:
    """Choose this node's address."""
    if server_args.nnodes > 1:
        meet_at("--dist-init-addr", first_node(server_args.dist_init_addr), OWN_ADDRESS)


def first_node(dist_init_addr: str | None) -> str:
    """The first node's address, without the port; raises ConfigError if there is none."""
    if not dist_init_addr:
        raise ConfigError("--nnodes: add --dist-init-addr, an address and a port of the first node")
    from sglang.srt.utils.network import NetworkAddress

    return NetworkAddress.parse(dist_init_addr).host


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.init_model_worker",
    reason="a node does not notice, or late, that another one has ended",
    remove_when="SGLang ends all nodes of a server when one ends",
    upstream="https://github.com/sgl-project/sglang/issues/3099",
)
def end_with_other_nodes(host: Callable[[Any], None], scheduler: Any) -> None:
    """Around `init_model_worker`: end this node when a scheduler of another one ends."""
    from sglang.srt.runtime_context import get_parallel

    host(scheduler)
    parallel = get_parallel()
    if parallel.nnodes == 1 or not is_ours(scheduler.model_config):
        return

    def lost(line: str) -> None:
        if not scheduler.gracefully_exit:
            logger.error("qwen3next_plugin: %s", line)
            os.kill(os.getppid(), signal.SIGQUIT)  # as SGLang's scheduler does when it fails

    group = parallel.world_group
    end_together(
        group,
        ranks_here=group.world_size // parallel.nnodes,
        first_node=parallel.node_rank == 0,
        own=os.environ[OWN_ADDRESS],
        lost=lost,
    )
