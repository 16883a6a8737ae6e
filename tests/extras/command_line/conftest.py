"""Fixtures of the commands' tests."""

import json
from pathlib import Path

import pytest

from released import RELEASED_80B


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder with the released model's config alone."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_80B))
    return tmp_path
