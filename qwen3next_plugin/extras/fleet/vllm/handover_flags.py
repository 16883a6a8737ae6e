"""Prefill and decode on two servers: refusals, and settings that both servers must share."""

import os

from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed import nixl_utils
from vllm.platforms import current_platform

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.vllm.names import HANDOVER as CONNECTOR
from qwen3next_plugin.extras.fleet.computed_by import digest
from qwen3next_plugin.extras.fleet.vllm.folder_flags import KEEPER, SPEC, in_folder
from qwen3next_plugin.extras.fleet.vllm.shared_settings import (
    WITHOUT,
    check_known_weights,
    settings_of,
    weights,
)

UNTESTED = ("NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector")
SETTINGS = {"enforce_handshake_compat": True, "bidirectional_kv_xfer": False}
ALIKE = "qwen3next_plugin"  # the setting with the values that both servers must share
LAYOUT = "VLLM_SSM_CONV_STATE_LAYOUT"  # vLLM insists on DS; a page has no such part


def hands_over(vllm_config: VllmConfig) -> bool:
    """Whether this server only prefills or only decodes, and another server does the rest."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == CONNECTOR


def check_handover(vllm_config: VllmConfig) -> None:
    """Refuse settings that would give wrong text, and a missing NIXL.

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
    if current_platform.is_cpu() and not (hands_over(vllm_config) or in_folder(vllm_config)):
        raise ConfigError(
            f"{transfer.kv_connector}: on a CPU this model's pages are moved by {CONNECTOR}, and "
            f"by {KEEPER} with {SPEC}, only; use one of them, {WITHOUT}"
        )
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
    """Pass workers the values that both servers must share; vLLM may call this repeatedly."""
    if not hands_over(vllm_config):
        return
    os.environ.setdefault(LAYOUT, "DS")
    found = settings_of(vllm_config, config)
    settings = vllm_config.kv_transfer_config.kv_connector_extra_config
    settings[ALIKE] = (
        f"weights={weights(vllm_config)}, dtype={found.dtype}, "
        f"num_speculative_tokens={found.layout.num_drafts}, "
        f"tensor_parallel_size={vllm_config.parallel_config.tensor_parallel_size}, "
        f"page_bytes={found.layout.page_bytes}, rest={digest(found)}"
    )
