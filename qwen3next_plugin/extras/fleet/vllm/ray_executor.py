"""vLLM's executor of Ray actors on CPUs: `--distributed-executor-backend ray`.

Ray places a worker where a CPU is free, instead of a GPU. Each of them computes with its share of
its machine's cores. vLLM asks Ray for devices by the platform's key, which a CPU does not have.
"""

import os
from typing import Any

import ray
import torch
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2, RayWorkerProc

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.executor import Executor
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.extras.fleet.nodes import meet_at
from qwen3next_plugin.extras.fleet.vllm.nodes import OWN_ADDRESS
from qwen3next_plugin.machine.cores import share

logger = init_logger(LOGGER)

OURS = "QWEN3NEXT_"  # variables, which are the same in all workers


@override(
    "vllm.v1.executor.ray_executor_v2.RayWorkerProc",
    reason="a worker asks Ray for its device, shares memory with those of other machines, and "
    "binds the same cores on each",
    remove_when="vLLM's Ray workers run on CPUs (`compat`)",
    upstream="https://github.com/vllm-project/vllm/pull/25386",
)
class RayWorker(RayWorkerProc):
    """A worker process in an actor of Ray."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        """The machine, and the rank in place of a device; vLLM passes on all of a machine's."""
        return ray.get_runtime_context().get_node_id(), [self._init_kwargs["rank"]]

    def initialize_worker(
        self,
        local_rank: int,
        env_vars: dict[str, str],
        distributed_init_method: str,
        driver_env_vars: dict[str, str] | None = None,
        assigned_physical_gpu_ids: list[int] | None = None,
    ) -> None:
        """Choose this machine's cores and address, then become a worker.

        Workers share memory if the ends of their init method's URL are equal.
        """
        compute_with_share(local_rank, len(assigned_physical_gpu_ids or (0,)))
        meet_at("Ray's address of this machine", ray.util.get_node_ip_address(), OWN_ADDRESS)
        here = f"{distributed_init_method}?node={ray.get_runtime_context().get_node_id()}"
        super().initialize_worker(local_rank, env_vars, here, driver_env_vars)


def compute_with_share(rank: int, ranks: int) -> None:
    """Bind this process to its part of the machine's cores; Ray would give it one thread."""
    found = share(ranks)
    cpus = found.cpus[rank]
    if found.threads is None:
        os.sched_setaffinity(0, cpus)
    torch.set_num_threads(found.threads or len(cpus))
    threads = torch.get_num_threads()
    logger.info("qwen3next_plugin: rank %d of %d here has %d threads", rank, ranks, threads)


class RayExecutor(Executor, RayExecutorV2):
    """Our executor, one call a step, for actors that Ray places by CPUs."""

    uses_ray = True

    @override(
        "vllm.platforms.interface.Platform.ray_device_key",
        reason="vLLM asks Ray for devices by it, and has no key for CPUs",
        remove_when="vLLM's CPU platform has one (`compat`)",
        upstream="https://github.com/vllm-project/vllm/issues/21602",
    )
    def _init_executor(self) -> None:
        """Start our workers where vLLM would start its own."""
        current_platform.ray_device_key = "CPU"
        ray_executor_v2.RayWorkerProc = RayWorker
        super()._init_executor()

    def _build_runtime_env(self) -> dict[str, Any]:
        """Add the plugin's environment variables, which vLLM does not pass on."""
        runtime_env = super()._build_runtime_env()
        own = {name: value for name, value in os.environ.items() if name.startswith(OURS)}
        runtime_env["env_vars"] = own | runtime_env["env_vars"]
        return runtime_env

    @override(
        "vllm.v1.executor.ray_executor_v2.RayExecutorV2._get_actor_resource_kwargs",
        reason="Ray takes no CPU among an actor's custom resources",
        remove_when="vLLM's Ray workers run on CPUs (`compat`)",
        upstream="https://github.com/vllm-project/vllm/pull/25386",
    )
    @staticmethod
    def _get_actor_resource_kwargs() -> dict[str, Any]:
        """Nothing besides the CPU that the placement group reserves for the worker."""
        return {"num_gpus": 0}
