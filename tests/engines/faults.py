"""Faults of the machine, made for one server: a folder that is full or read-only, no network."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engines.clients import eventually
from engines.process import START_SECONDS, TESTS
from engines.server import Server

NAMESPACE = ("unshare", "--map-root-user", "--mount")
NEEDS_NAMESPACES = pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="no mount namespaces here",
)
# What makes a folder so, in a namespace: {} is the folder.
STATES = {
    "full": "mount -t tmpfs -o size=256k none {0} && {{ cat /dev/zero > {0}/fill 2>&-; true; }}",
    "read-only": "mount -t tmpfs -o ro none {0}",
}


def where(folder: str, state: str, command: list[str]) -> list[str]:
    """The command, run where the folder is in that state; nobody else sees it so."""
    return [*NAMESPACE, *_after(STATES[state].format(folder), command)]


def check_cut_off(home: Path, module: str) -> None:
    """`answers` of this module returns where only the loopback is up and HOME is read-only."""
    setup = f"PATH=$PATH:/usr/sbin ip link set lo up && {STATES['read-only'].format(home)}"
    code = f"import {module} as module; module.answers()"
    env = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [*NAMESPACE, "--net", *_after(setup, [sys.executable, "-c", code])],
        env=env | {"HOME": str(home), "PYTHONPATH": TESTS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _after(setup: str, command: list[str]) -> list[str]:
    return ["bash", "-c", f'{setup} && exec "$@"', "-", *command]


def check_ends(server: Server, says: str) -> None:
    """It ends by itself, in failure and with this in its log, and leaves nothing."""
    try:
        server.process.wait(START_SECONDS)
        log = server.process.text()
        assert server.process.code(), log[-4000:]
        assert says in log
        assert "leaked" not in log  # shared memory, as Python's resource tracker says
        assert eventually(lambda: not _group(server.process.child.pid))
    finally:
        server.close()


def _group(leader: int) -> list[int]:
    """The processes of a group."""
    return [pid for pid in psutil.pids() if _group_of(pid) == leader]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
