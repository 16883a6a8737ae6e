"""Prefill and decode on two servers: what is refused at start, besides flags (served.py)."""

from importlib.util import find_spec
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.state.alike import MODE_FLAG, check_known_weights


def hands_over(server_args: Any) -> bool:
    """Whether this server has one part of each request, and another server the other part."""
    return server_args.disaggregation_mode != "null"


def check_handover(server_args: Any) -> None:
    """Refuse what would give wrong text, and what is not there.

    Raises:
        ConfigError: names the setting and the fix.
    """
    if not hands_over(server_args):
        return
    check_known_weights(server_args, "the other server", MODE_FLAG)
    if find_spec("nixl") is None:
        raise ConfigError(
            f"{MODE_FLAG} {server_args.disaggregation_mode}: NIXL is missing; pip install "
            f"'qwen3next-plugin[nixl]', or leave out {MODE_FLAG}"
        )
