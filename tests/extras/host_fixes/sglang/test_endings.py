"""What a server leaves in /dev/shm has a name that a later start knows; Ctrl-C is no error."""

import os
import signal
from pathlib import Path
from time import time

import pytest

from checkpoints import SHIPPED
from engines.clients import PROMPTS, complete, eventually
from engines.sglang.server import NEXTN, Server
from qwen3next_plugin.extras.host_fixes.sglang import endings
from qwen3next_plugin.machine import leftovers


@pytest.fixture
def path():
    """Where SGLang writes how busy an engine is, with our patches."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers import load_snapshot

    found = Path(load_snapshot.shm_path_for("ipc:///tmp/test-endings"))
    assert found.parent == leftovers.SHARED_MEMORY
    assert found.match(endings.LOADS)
    yield found
    found.unlink(missing_ok=True)


def test_a_start_removes_what_a_killed_server_left(monkeypatch, path):
    monkeypatch.setattr(leftovers, "SECONDS", -1)
    with path.open("wb"):
        assert path not in leftovers.remove_dead(endings.LOADS)
    assert path in leftovers.remove_dead(endings.LOADS)


def test_ctrl_c_is_no_error(path):
    path.touch()

    def serve(*args, **kwargs):
        assert (args, kwargs) == (("flags",), {"launch_callback": None})
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        endings.end_quietly(serve, "flags", launch_callback=None)
    assert ended.value.code == 130
    assert ended.value.__suppress_context__  # no traceback
    assert not path.exists()


@pytest.mark.serve
def test_ctrl_c_leaves_nothing(path):
    """As a terminal sends it: to all of its processes. And the start removes what another left."""
    path.touch()
    assert eventually(lambda: time() - path.stat().st_ctime > leftovers.SECONDS)
    server = Server(SHIPPED, *NEXTN, "3").wait()  # a fork has patches that a new process may lack
    try:
        assert not path.exists()
        assert complete(server, PROMPTS[0])
        assert any(Path(file).match(endings.LOADS) for file in server.shared_memory())
        with server.ends_cleanly(130):
            os.killpg(server.process.child.pid, signal.SIGINT)
    finally:
        server.close()
