"""Fixtures that every folder of tests may use."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from reference import Reference

# Each engine has an environment of its own; what is there for the other one stays out.
MISSING = [engine for engine in ("vllm", "sglang") if find_spec(engine) is None]
collect_ignore = [f"engines/{engine}" for engine in MISSING]


def pytest_report_header() -> list[str]:
    return [f"no {engine} here: tests/engines/{engine} is left out" for engine in MISSING]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint that most tests serve."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    """transformers' fp32 model of a checkpoint, loaded once."""
    return cache(Reference)
