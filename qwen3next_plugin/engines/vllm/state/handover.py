"""Prefill on one server, decode on another: pages through vLLM's NIXL connector, on CPUs.

The connector reads a recurrent state in parts, so that servers may have different numbers of
tensor parallel ranks. A page is one part, read whole, and only from a server that is alike in all
that decides what is in it.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed import nixl_utils
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.vllm.names import BACKEND_NAME
from qwen3next_plugin.engines.vllm.state.alike import (
    WITHOUT,
    alike,
    check_known_weights,
    stored_weights,
)
from qwen3next_plugin.model.checkpoint.fingerprint import fingerprint

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
        MambaConvSplitInfo,
    )

CONNECTOR = "NixlConnector"
UNTESTED = ("NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector")
SETTINGS = {"enforce_handshake_compat": True, "bidirectional_kv_xfer": False}
ALIKE = "qwen3next_plugin"  # the setting that tells workers what both servers must have alike
LAYOUT = "VLLM_SSM_CONV_STATE_LAYOUT"  # vLLM insists on DS; a page has no such part
WAIT = 100_000  # µs that NIXL's thread waits for data before it looks anyway


def hands_over(vllm_config: VllmConfig) -> bool:
    """Whether this server has one part of each request, and another server the other part."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_handover(vllm_config: VllmConfig) -> None:
    """Refuse what would give wrong text, and what is not there.

    Raises:
        ConfigError: names the setting and the fix.
    """
    transfer: KVTransferConfig | None = vllm_config.kv_transfer_config
    if transfer is None:
        return
    if found := [name for name in UNTESTED if transfer.has_connector(name)]:
        raise ConfigError(f"{found[0]} is not tested with this model's pages; use {CONNECTOR}")
    if transfer.has_connector(CONNECTOR) and not hands_over(vllm_config):
        raise ConfigError(f"{transfer.kv_connector}: use {CONNECTOR} alone")
    if not hands_over(vllm_config):
        return
    if not current_platform.is_cpu():
        raise ConfigError(f"{CONNECTOR} hands over this model's pages on CPUs only")
    if not nixl_utils.is_nixl_available():
        raise ConfigError(f"{CONNECTOR}: pip install 'qwen3next-plugin[nixl]', {WITHOUT}")
    for name, served in SETTINGS.items():
        if (value := transfer.get_from_extra_config(name, served)) != served:
            raise ConfigError(f"{name} = {value}: only {served} is served; leave it out")
    check_known_weights(vllm_config, CONNECTOR)


def complete_handover(vllm_config: VllmConfig, config: Qwen3NextConfig) -> None:
    """Tell the workers what the other server must have alike; vLLM completes repeatedly."""
    if not hands_over(vllm_config):
        return
    os.environ.setdefault(LAYOUT, "DS")
    found = alike(vllm_config, config)
    weights = fingerprint(stored_weights(vllm_config), of_copies=True)
    rest = sha256(repr(found).encode()).hexdigest()[:16]
    settings = vllm_config.kv_transfer_config.kv_connector_extra_config
    settings[ALIKE] = (
        f"weights={weights}, dtype={found.dtype}, "
        f"num_speculative_tokens={found.layout.num_drafts}, "
        f"tensor_parallel_size={vllm_config.parallel_config.tensor_parallel_size}, "
        f"page_bytes={found.layout.page_bytes}, rest={rest}"
    )


def with_what_is_alike(
    host: Callable[..., str],
    vllm_config: VllmConfig,
    attn_backend_name: str,
    transfer_mode: str = "pull",
) -> str:
    """vLLM's digest of what two servers must have alike, and ours, which is to be read."""
    own = vllm_config.kv_transfer_config.kv_connector_extra_config[ALIKE]
    return f"{host(vllm_config, attn_backend_name, transfer_mode)} ({own})"


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


@contextmanager
def beside_computation(vllm_config: VllmConfig) -> Iterator[None]:
    """While vLLM makes its NIXL connector: leave all cores to those who compute.

    vLLM moves this thread, one of them, to the last core. NIXL's own thread waits 0 µs for data,
    and again, so it keeps a core busy; it wakes as early if it may wait longer. Remove when vLLM
    leaves the thread where it is, and NIXL waits.
    """
    if not hands_over(vllm_config):
        yield
        return
    bindings = sys.modules[nixl_utils.NixlWrapper.__module__].nixlBind
    cores, agent = os.sched_getaffinity(0), bindings.nixlAgent

    def waiting(name: str, config: Any) -> Any:
        config.pthrDelay = WAIT
        return agent(name, config)

    bindings.nixlAgent = waiting
    try:
        yield
    finally:
        bindings.nixlAgent = agent
        os.sched_setaffinity(0, cores)
