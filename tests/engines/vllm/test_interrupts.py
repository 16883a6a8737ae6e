"""SIGTERM stops a server that loads, and all of its processes. test_server.py: one that serves."""

import os
import signal

import psutil
import pytest
import zmq
from vllm.utils.network_utils import get_open_zmq_ipc_path, zmq_socket_ctx

from engines.clients import eventually
from engines.vllm.server import ForkedTwice


@pytest.mark.serve
def test_sigterm_while_the_engine_loads(checkpoint):
    flags = ("--dtype", "float32", "--max-model-len", "512", "--enforce-eager")
    server = ForkedTwice(checkpoint, *flags)
    try:
        assert eventually(lambda: "(EngineCore pid=" in server.process.text())
        processes = server.processes()
        assert len(processes) > 1
        os.kill(processes[0].pid, signal.SIGTERM)
        assert eventually(lambda: server.process.code() is not None), server.process.text()
        assert "The server was told to end while its engine loaded" in server.process.text()
        assert not psutil.wait_procs(processes, 20)[1]
    finally:
        server.close()


@pytest.mark.compat
def test_vllm_swallows_an_interrupt():
    """Fails when it does not: then `end_while_loading` can go."""
    with zmq_socket_ctx(get_open_zmq_ipc_path(), zmq.ROUTER, bind=True):
        raise KeyboardInterrupt
