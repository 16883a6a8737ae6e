"""What a server needs beside its own port: a prefill server's second, a folder for metrics."""

import socket
from types import SimpleNamespace as Bag

import pytest

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.host_fixes.sglang import metrics_files, ports


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


def test_metrics_need_a_folder(monkeypatch, tmp_path):
    monkeypatch.setenv(metrics_files.FOLDER, str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match=f"{metrics_files.FOLDER}=.*gone is no folder; make it"):
        metrics_files.check_room(Bag(enable_metrics=True))
    metrics_files.check_room(Bag(enable_metrics=False))
