"""Refuses a port in use, which SGLang would notice only after loading, and then wait for."""

import errno
import multiprocessing
import socket
import sys
from pathlib import Path
from typing import Any

from qwen3next_plugin.config.errors import ConfigError

NO_HOST = (errno.EADDRNOTAVAIL, socket.EAI_NONAME, socket.EAI_AGAIN)  # no such host here
COMMANDS = ("sglang.launch_server", "sglang")  # `python -m` and the script


def check_port(server_args: Any) -> None:
    """Check that a server that is about to start can listen.

    An Engine and child processes have the same arguments, but do not listen.

    Raises:
        ConfigError: names the flag.
    """
    if not _starts_server() or server_args.node_rank:
        return
    _check_bind(server_args.host, "--port", server_args.port)
    if server_args.disaggregation_mode == "prefill":  # SGLang only logs that this one is in use
        port = server_args.disaggregation_bootstrap_port
        _check_bind(server_args.host, "--disaggregation-bootstrap-port", port)


def _check_bind(host: str, name: str, port: int) -> None:
    """Check one port; name: its flag."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OverflowError as error:  # no port has that number
        raise _refused(name, port, host, str(error)) from None
    except OSError as error:
        flag, value = ("--host", host) if error.errno in NO_HOST else (name, port)
        raise _refused(flag, value, host, error.strerror or str(error)) from None


def _refused(flag: str, value: str | int, host: str, why: str) -> ConfigError:
    return ConfigError(
        f"{flag} {value}: the server cannot listen on {host} ({why}); choose another"
    )


def _starts_server() -> bool:
    """Whether this process is SGLang's command for a server."""
    spec = sys.modules["__main__"].__spec__
    command = spec.name if spec else Path(sys.argv[0]).name
    return command in COMMANDS and multiprocessing.parent_process() is None
