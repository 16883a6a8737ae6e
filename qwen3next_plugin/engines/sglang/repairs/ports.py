"""A port in use, which SGLang finds after the model is loaded, and then waits for minutes."""

import multiprocessing
import socket
import sys
from pathlib import Path
from typing import Any

from qwen3next_plugin.config.errors import ConfigError

COMMANDS = ("sglang.launch_server", "sglang")  # `python -m` and the script


def check_port(server_args: Any) -> None:
    """Check that a server that is about to start can listen.

    An Engine, and the processes of either, have the same arguments and listen nowhere.

    Raises:
        ConfigError: names the port.
    """
    if not _starts_server() or server_args.node_rank:
        return
    host, port = server_args.host, server_args.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ConfigError(
            f"--port {port}: the server cannot listen on {host} ({error.strerror}); "
            "choose another port"
        ) from None


def _starts_server() -> bool:
    """Whether this process is SGLang's command for a server."""
    spec = sys.modules["__main__"].__spec__
    command = spec.name if spec else Path(sys.argv[0]).name
    return command in COMMANDS and multiprocessing.parent_process() is None
