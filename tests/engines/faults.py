"""Faults of the machine, for one server: a full or read-only folder, no network, no memory."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import openai
import psutil
import pytest

from benchmarks.sizes import CONFIGS
from engines.clients import complete, eventually
from engines.process import START_SECONDS, TESTS
from engines.server import Server
from needs import memory_cgroup, need

NAMESPACE = ("unshare", "--map-root-user", "--mount")
# What makes a folder so, in a namespace: {} is the folder.
STATES = {
    "full": "mount -t tmpfs -o size=256k none {0} && {{ cat /dev/zero > {0}/fill 2>&-; true; }}",
    "read-only": "mount -t tmpfs -o ro none {0}",
    "read-only, with its files": "mount --bind {0} {0} && mount -o remount,bind,ro {0}",
    "nearly full": "mount -t tmpfs -o size=256k none {0}",
}
# Of weights that are never written; it reads a config alone.
TOO_LARGE = (CONFIGS / "Qwen3.8-2.4T-A95B", "--load-format", "dummy", "--skip-tokenizer-init")
TOO_LITTLE = "on this machine, of which this process may use 3.00 GiB: serve a smaller model"

NO_MEMORY = re.compile(r"can't allocate memory|MemoryError|bad_alloc")  # torch, Python, C++


def where(folder: str, state: str, command: list[str]) -> list[str]:
    """The command, run where the folder is in that state; nobody else sees it so."""
    return [*NAMESPACE, *_after(STATES[state].format(folder), command)]


def without_caches(env: Mapping[str, str]) -> dict[str, str]:
    """Without folders: importing torch has put some into this process's environment."""
    folders = ("CACHE_DIR", "CACHE_HOME", "CACHE_ROOT")
    return {name: value for name, value in env.items() if not name.endswith(folders)}


def check_cut_off(home: Path, module: str) -> None:
    """`answers` of this module returns where only the loopback is up and HOME is read-only."""
    setup = f"PATH=$PATH:/usr/sbin ip link set lo up && {STATES['read-only'].format(home)}"
    code = f"import {module} as module; module.answers()"
    env = without_caches(os.environ)
    done = subprocess.run(
        [*NAMESPACE, "--net", *_after(setup, [sys.executable, "-c", code])],
        env=env | {"HOME": str(home), "PYTHONPATH": TESTS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def _after(setup: str, command: list[str]) -> list[str]:
    return ["bash", "-c", f'{setup} && exec "$@"', "-", *command]


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup with 3 GiB of memory."""
    need("cgroup")
    limit = memory_cgroup()
    made = limit.parent / f"qwen3next-{os.getpid()}"
    made.mkdir()
    try:
        (made / limit.name).write_text(f"{3 << 30}")
        yield made
    finally:
        assert eventually(lambda: not (made / "cgroup.procs").read_text())
        made.rmdir()


def inside(made: Path, command: list[str]) -> list[str]:
    """The command, run in a cgroup."""
    return ["bash", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"', str(made), *command]


def check_ends(server: Server, says: str) -> None:
    """It ends by itself, in failure and with this in its log, and leaves nothing."""
    try:
        log = _log_of_failure(server)
        assert says in log, log[-4000:]
        assert "leaked" not in log  # shared memory, as Python's resource tracker says
    finally:
        server.close()


def check_ends_without_memory(server: Server) -> None:
    """A server whose worker gets no more memory ends, in failure and with that in its log.

    Shared memory may be left to Python's resource tracker, which frees it.
    """
    try:
        _, *others = server.processes()
        worker = max(others, key=lambda each: each.memory_info().rss)
        # Not of its address space: of that, malloc has up to 64 MiB a thread in reserve.
        worker.rlimit(psutil.RLIMIT_DATA, (worker.memory_info().data,) * 2)
        with pytest.raises(openai.APIError):
            complete(server, "word " * 6000)
        log = _log_of_failure(server)
        assert NO_MEMORY.search(log), log[-4000:]
    finally:
        server.close()


def _log_of_failure(server: Server) -> str:
    server.process.wait(START_SECONDS)
    log = server.process.text()
    assert server.process.code(), log[-4000:]
    assert eventually(lambda: not _group(server.process.child.pid))
    return log


def _group(leader: int) -> list[int]:
    """The processes of a group."""
    return [pid for pid in psutil.pids() if _group_of(pid) == leader]


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
