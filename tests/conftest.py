"""Fixtures that every folder of tests may use."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from checkpoints import write_checkpoint
from reference import Reference


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random checkpoint that most tests serve."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Reference]:
    """transformers' fp32 model of a checkpoint, loaded once."""
    return cache(Reference)
