"""Ports that a prefill server needs beside its own."""

import socket
from types import SimpleNamespace as Bag

import pytest

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.host_fixes.sglang import ports


def test_a_bootstrap_port_in_use_is_named(monkeypatch):
    """By another prefill server of this machine: SGLang would only log it."""
    monkeypatch.setattr(ports, "_starts_server", lambda: True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        args = Bag(host="127.0.0.1", port=0, node_rank=0, disaggregation_bootstrap_port=port)
        args.disaggregation_mode = "prefill"
        with pytest.raises(ConfigError, match=f"--disaggregation-bootstrap-port {port}: the serv"):
            ports.check_port(args)
        args.disaggregation_mode = "decode"
        ports.check_port(args)
