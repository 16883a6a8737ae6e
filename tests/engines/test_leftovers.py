"""Files of killed servers in /dev/shm are removed; those that a process still uses never are."""

import os
import signal
import subprocess
import sys
from secrets import token_hex

import pytest

from engines.clients import eventually
from qwen3next_plugin.machine import leftovers

USES = {
    "mapped": "import mmap; kept = mmap.mmap(file, 4096); os.close(file)",
    "open": "kept = file",
}
CREATE = "import os, sys, time; file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600); "
WAIT = "; os.write(1, b'ready'); time.sleep(600)"


@pytest.fixture
def name(monkeypatch):
    monkeypatch.setattr(leftovers, "SECONDS", -1)
    return f"qwen3next-test-{os.getpid()}-{token_hex(4)}"


@pytest.mark.parametrize("use", USES)
def test_a_file_goes_with_its_owner(name, use):
    path = leftovers.SHARED_MEMORY / name
    path.write_bytes(bytes(4096))
    command = [sys.executable, "-c", CREATE + USES[use] + WAIT, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        try:
            assert owner.stdout.read(5) == b"ready"
            assert not leftovers.remove_dead(f"{name}*")
            assert path.exists()
        finally:
            owner.send_signal(signal.SIGKILL)
    assert eventually(lambda: leftovers.remove_dead(f"{name}*") == [path])
    assert not path.exists()


def test_what_is_new_or_not_ours_stays(monkeypatch, name, tmp_path):
    path = leftovers.SHARED_MEMORY / name
    path.write_bytes(b"")
    try:
        monkeypatch.setattr(leftovers, "SECONDS", 600)
        assert not leftovers.remove_dead(f"{name}*")  # its owner may be about to open it
        monkeypatch.setattr(leftovers, "SECONDS", -1)
        (target := tmp_path / "target").touch()
        (link := leftovers.SHARED_MEMORY / f"{name}-link").symlink_to(target)
        assert not leftovers.remove_dead(f"{name}-link")
        link.unlink()
        assert target.exists()
        assert not leftovers.remove_dead("another*")
        assert path.exists()
    finally:
        path.unlink()
