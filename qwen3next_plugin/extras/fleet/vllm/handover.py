"""Prefill on one server, decode on another: pages through vLLM's NIXL connector, on CPUs.

The connector reads a recurrent state in parts, so that servers may have different numbers of
tensor parallel ranks. A page is one part, read whole, and only from a server that shares all
settings on which its content depends (handover_flags.py).
"""

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm.config import VllmConfig
from vllm.distributed import nixl_utils
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.engines.vllm.patches import patch
from qwen3next_plugin.extras.fleet.nixl import waiting
from qwen3next_plugin.extras.fleet.vllm.groups import When
from qwen3next_plugin.extras.fleet.vllm.handover_flags import ALIKE

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
        MambaConvSplitInfo,
    )
    from vllm.v1.kv_cache_interface import KVCacheConfig


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker.compute_nixl_compatibility_hash",
    reason="vLLM compares neither draft lengths nor weights nor states' dtypes, and names "
    "nothing that differs",
    remove_when="a model can add to what is compared",
)
def with_shared_settings(
    host: Callable[..., str],
    vllm_config: VllmConfig,
    attn_backend_name: str,
    transfer_mode: str = "pull",
) -> str:
    """vLLM's digest of the settings that both servers must share, and ours, in readable form."""
    own = vllm_config.kv_transfer_config.kv_connector_extra_config[ALIKE]
    return f"{host(vllm_config, attn_backend_name, transfer_mode)} ({own})"


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker.derive_mamba_conv_split",
    reason="vLLM's NIXL connector reads only states of its own layers, in parts by heads",
    remove_when="it reads any other state whole between equal tensor parallel sizes",
)
def in_one_part(
    host: "Callable[..., MambaConvSplitInfo]", mamba_spec: MambaSpec, local_tp: int
) -> "MambaConvSplitInfo":
    """The parts of a state: a page is no convolution window, and a state of all its bytes."""
    if mamba_spec.mamba_type != MambaAttentionBackendEnum[BACKEND_NAME]:
        return host(mamba_spec, local_tp)
    from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
        MambaConvSplitInfo,
    )

    return MambaConvSplitInfo(
        conv_rows=0,
        local_proj_dims=(),
        conv_dtype_size=1,
        ssm_sizes=(0, mamba_spec.page_size_bytes),
    )


@patch(
    When.HANDOVER,
    "vllm.v1.worker.gpu_worker.ensure_kv_transfer_initialized",
    reason="NIXL's thread keeps a core busy, and vLLM moves the thread that computes to the last "
    "core",
    remove_when="NIXL waits for data, and vLLM leaves the thread where it is",
)
def beside_computation(
    host: Callable[..., None], vllm_config: VllmConfig, kv_cache_config: "KVCacheConfig"
) -> None:
    """Make vLLM's NIXL connector, with a thread that does not keep a core busy."""
    cores = os.sched_getaffinity(0)
    try:
        with waiting(sys.modules[nixl_utils.NixlWrapper.__module__].nixlBind):
            host(vllm_config, kv_cache_config)
    finally:
        os.sched_setaffinity(0, cores)
