"""What tests need of a machine: one table, and the one place where a test is skipped.

`REQUIRE`, in the environment, names what must be there: a test that lacks it fails instead of being
skipped. `all` is everything in the table, and `-gpu` leaves the GPU out. See docs/testing.md.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from platform import machine
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"  # Debian's `ip` is not on a user's
LEVELS = ("avx2", "avx512", "avx512bf16", "amx", "dotprod", "i8mm")

needs = pytest.mark.needs  # @needs("ip", "root"): on a test, a parameter or a module


class Need(NamedTuple):
    """Why a test is skipped without it; whether it is here."""

    reason: str
    here: Callable[[], bool]


def _installed(module: str) -> bool:
    return find_spec(module) is not None


def _runs(*command: str) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


def _has_level(name: str) -> bool:
    from qwen3next_plugin.kernels import native

    return name in native.levels()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _extra(name: str) -> bool:
    from qwen3next_plugin.engines.extras import FOLDER

    return (FOLDER / name).is_dir()


def _stand_in() -> bool:
    """Another test may have put the stand-in on this process's path."""
    folders = [folder for folder in sys.path if not folder.endswith("/stand_in")]
    return PathFinder.find_spec("sgl_kernel", folders) is None


def memory_cgroup() -> Path | None:
    """The file that limits the memory of this process's cgroup, where another one can be made."""
    from qwen3next_plugin.machine.cgroups import LIMITS, folders

    limits = [f / name for f in folders("memory") for name in LIMITS if (f / name).is_file()]
    if not limits:
        return None
    tried = limits[-1].with_name(f"qwen3next-tried-{os.getpid()}")
    try:
        tried.mkdir()
        tried.rmdir()
    except OSError:
        return None
    return limits[-1]


def _huge_pages() -> bool:
    return ENABLED.exists() and "[never]" not in ENABLED.read_text()


def _no_decoder() -> bool:
    return not any(map(_installed, ("torchcodec", "decord")))


def _binutils() -> bool:
    return all(map(shutil.which, ("nm", "objdump")))


def _both_environments() -> bool:
    return all((ROOT / f".venv-{name}" / "bin" / "python").exists() for name in ("vllm", "sglang"))


MOUNT = ("unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt")
NEEDS: Mapping[str, Need] = {
    **{name: Need("not of this processor", partial(_has_level, name)) for name in LEVELS},
    "x86-64": Need("not of this processor", lambda: machine() == "x86_64"),
    "aarch64": Need("not of this processor", lambda: machine() == "aarch64"),
    "two-cores": Need("one", lambda: len(os.sched_getaffinity(0)) > 1),
    "gpu": Need("none", lambda: _gpus() > 0),
    "two-gpus": Need("one GPU or none", lambda: _gpus() > 1),
    "huge-pages": Need("off", _huge_pages),
    "root": Need("no networks can be made", partial(_runs, "unshare", "--net", "true")),
    "ip": Need("no iproute2", lambda: shutil.which("ip", path=PATH) is not None),
    "mounts": Need("nothing can be mounted", partial(_runs, *MOUNT)),
    "cgroup": Need("none can limit memory", lambda: memory_cgroup() is not None),
    "binutils": Need("no `nm` or `objdump`", _binutils),
    "vllm": Need("not in this environment", partial(_installed, "vllm")),
    "both-venvs": Need("`make setup` makes them", _both_environments),
    "ray": Need("`make test-long` installs them", (ROOT / ".ray").exists),
    "router": Need("`make test-long` installs them", (ROOT / ".router" / "bin").exists),
    "qwen-agent": Need("`make test-long` installs them", (ROOT / ".qwen-agent" / "bin").exists),
    "pack": Need("the extra is deleted", partial(_extra, "pack")),
    "wheel": Need("`make test-wheel` names one", lambda: "WHEEL" in os.environ),
    "stand-in": Need("`sgl_kernel` is genuine", _stand_in),
    "no-videos": Need("a decoder is installed", _no_decoder),
}  # fmt: skip


def need(name: str) -> None:
    """Skip the running test, or the module, if this machine lacks it; fail if REQUIRE names it."""
    if here(name):
        return
    if name in required():
        pytest.fail(f"REQUIRE asks for {name}: {NEEDS[name].reason}", pytrace=False)
    pytest.skip(_line(name), allow_module_level=True)


def required() -> set[str]:
    """The names of REQUIRE. Raises: ValueError at one that is not in the table."""
    words = os.environ.get("REQUIRE", "").split()
    unknown = {word.removeprefix("-") for word in words} - {*NEEDS, "all"}
    if unknown:
        raise ValueError(f"REQUIRE: {', '.join(sorted(unknown))}: of tests/needs.py are {[*NEEDS]}")
    left_out = {word[1:] for word in words if word.startswith("-")}
    return ({*NEEDS} if "all" in words else {*words} & {*NEEDS}) - left_out


def declared(reason: str) -> bool:
    """Whether a test was skipped for one of these reasons."""
    return any(reason == f"Skipped: {_line(name)}" for name in NEEDS)


def _line(name: str) -> str:
    return f"needs {name}: {NEEDS[name].reason}"


@cache
def here(name: str) -> bool:
    return NEEDS[name].here()
