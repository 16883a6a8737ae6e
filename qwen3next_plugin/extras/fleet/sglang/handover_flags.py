"""Prefill and decode on two servers: refusals and defaults at start."""

from importlib.util import find_spec
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.flags import check_served, flag
from qwen3next_plugin.engines.sglang.served import LEAVE_OUT, POOL, Served
from qwen3next_plugin.extras.fleet.sglang.shared_settings import MODE_FLAG, check_known_weights

HANDED_OVER = "prompts are handed over whole, from memory to memory"
ONE_ENGINE = "a server that hands requests over is one engine on one machine"
# Further limits, if another server reads the prompts or decodes.
SERVED_APART: Served = {
    "disaggregation_transfer_backend": (("nixl",), "it does not copy between CPUs", "use nixl"),
    "disaggregation_enable_kv_checksum": ((False,), "it is computed on a GPU", LEAVE_OUT),
    "disaggregation_decode_enable_radix_cache": ((False,), HANDED_OVER, LEAVE_OUT),
    "disaggregation_decode_enable_offload_kvcache": ((False,), POOL, LEAVE_OUT),
    "disaggregation_decode_host_receive_threshold": ((1.0,), POOL, LEAVE_OUT),
    "disaggregation_decode_retraction_backup": ((None, "cpu_tensor"), POOL, LEAVE_OUT),
    "enable_pd_role_switch": ((False,), "a server keeps its part", LEAVE_OUT),
    "enable_streaming_session": ((False,), "a turn's state stays in one server", LEAVE_OUT),
    "dp_size": ((1,), ONE_ENGINE, "start more servers"),
    "nnodes": ((1,), ONE_ENGINE, LEAVE_OUT),
    "enable_unified_cache_external_linker": ((False,), HANDED_OVER, LEAVE_OUT),
    "kv_cache_dtype": (("auto",), "KV has the model's dtype in both servers", LEAVE_OUT),
    "speculative_eagle_topk": ((None, 1), "drafts of a decode server are chains", "use 1"),
}
# SGLang makes pages for up to three times as many requests, for which no memory is set aside.
EXTRA_SLOTS = "disaggregation_decode_extra_slots"


def hands_over(server_args: Any) -> bool:
    """Whether this server only prefills or only decodes, and another server does the rest."""
    return server_args.disaggregation_mode != "null"


def check_handover(server_args: Any) -> None:
    """Refuse settings that would give wrong text, and a missing NIXL.

    Raises:
        ConfigError: names the setting and the fix.
    """
    if not hands_over(server_args):
        return
    check_served(server_args, SERVED_APART)
    check_known_weights(server_args, "the other server", MODE_FLAG)
    if find_spec("nixl") is None:
        raise ConfigError(
            f"{MODE_FLAG} {server_args.disaggregation_mode}: NIXL is missing; pip install "
            f"'qwen3next-plugin[nixl]', or leave out {MODE_FLAG}"
        )


def complete_handover(server_args: Any) -> list[str]:
    """Fill in defaults; returns them as command-line flags."""
    decodes = server_args.disaggregation_mode == "decode"
    if not decodes or server_args._raw_input[EXTRA_SLOTS] is not None:
        return []
    setattr(server_args, EXTRA_SLOTS, 0)
    return [flag(EXTRA_SLOTS, 0)]
