"""Fixtures that every folder of tests may use."""

import os
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from durations import Durations
from needs import declared, need, required

if TYPE_CHECKING:  # torch is imported by the workers only, all at the same time
    from reference import Reference

# Each engine has an environment of its own; what is there for the other one stays out: `make test`
# runs it in the other one.
PLACES = (("engines/", ""), ("gpu/test_", "_gpu.py"))
MISSING = [engine for engine in ("vllm", "sglang") if find_spec(engine) is None]
collect_ignore = [f"{place}{engine}{ending}" for engine in MISSING for place, ending in PLACES]
collect_ignore_glob = [f"extras/*/{engine}" for engine in MISSING]

for name in ("no_proxy", "NO_PROXY"):  # servers of tests are on this machine
    os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1", "localhost")))

WORKER_BYTES = 2 << 30  # that a worker takes at most, beside engines that it starts

T = TypeVar("T")
R = TypeVar("R", pytest.TestReport, pytest.CollectReport)


def pytest_xdist_auto_num_workers() -> int:
    """As many as this process may use cores and memory of the machine, which a container limits."""
    from qwen3next_plugin.machine import cgroups, cores

    usable = (len(os.sched_getaffinity(0)), cores.quota(), cgroups.memory_bytes() // WORKER_BYTES)
    return max(1, min(n for n in usable if n is not None))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="also run the tests marked `long`, and all at full size"
    )
    parser.addoption("--durations-to", type=Path, help="write the seconds of each file, as JSON")


def pytest_configure(config: pytest.Config) -> None:
    try:
        required()
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    path = config.getoption("durations_to")
    if path and not hasattr(config, "workerinput"):  # a worker of pytest-xdist: it reports
        config.pluginmanager.register(Durations(path))


def pytest_report_header(config: pytest.Config) -> list[str]:
    tier = "all tests, at full size" if config.getoption("long") else "none marked `long`"
    missing = [f"no {engine} here: tests/engines/{engine} is left out" for engine in MISSING]
    return [f"tests: {tier}", *missing]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out files without a test that `-m` asks for: importing them all takes long."""
    asked = config.option.markexpr
    if asked not in ("serve", "not serve") or not collection_path.match("test_*.py"):
        return None
    lines = [line for line in collection_path.read_text().splitlines() if "mark.serve" in line]
    of_all = any(line.startswith("pytestmark = ") for line in lines)
    return True if (of_all if asked == "not serve" else not lines) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without --long, tests marked `long` are deselected."""
    if config.getoption("long"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    items[:] = [item for item in items if not item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("needs"):
        for name in mark.args:
            need(name)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip for a reason that is not in the table of needs.py is a failure."""
    return _without_others((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _without_others((yield))


def _without_others(report: R) -> R:
    if report.skipped and not declared(report.longrepr[2]):
        report.outcome, report.longrepr = "failed", f"{report.longrepr}: not of tests/needs.py"
    return report


@pytest.fixture(scope="session")
def size(pytestconfig: pytest.Config) -> Callable[[T, T], T]:
    """`size(small, long)`: how much of a test to run, `long` with --long."""
    whole = pytestconfig.getoption("long")
    return lambda small, long: long if whole else small


@pytest.fixture(autouse=True)
def no_kept_kernels() -> Iterator[None]:
    """Forget the kernels that an engine chose: the next test reads QWEN3NEXT_KERNELS again."""
    yield
    if dispatch := sys.modules.get("qwen3next_plugin.kernels.dispatch"):
        dispatch._CHOSEN.clear()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint that most tests serve."""
    from checkpoints import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def reference() -> "Callable[[Path], Reference]":
    """transformers' fp32 model of a checkpoint, loaded once."""
    from reference import Reference

    return cache(Reference)


@pytest.fixture
def grant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, str]], None]:
    """Make up cgroups: what /proc/self/cgroup says, and files by path."""
    from qwen3next_plugin.machine import cgroups

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        monkeypatch.setattr(cgroups, "CGROUPS", tmp_path)
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "own")

    return write


@pytest.fixture
def grant_memory(
    grant: Callable[[str, dict[str, str]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """Make up a cgroup of so many bytes, on a machine with so much swap."""
    from qwen3next_plugin.engines import memory

    def write(nbytes: int, swap: int = 0) -> None:
        grant("0::/\n", {"memory.max": f"{nbytes}\n"})
        free = f"MemAvailable: {nbytes >> 10:10} kB\n"
        (tmp_path / "meminfo").write_text(f"{free}SwapTotal: {swap >> 10:10} kB\n")
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")

    return write
