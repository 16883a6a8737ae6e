"""Which folder takes the place of one that cannot be written."""

import os
import stat

import pytest

from qwen3next_plugin.machine.caches import instead_of

NOWHERE = "/dev/null/.cache/engine"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"engine-{os.getuid()}"


def test_a_private_temporary_folder(folder):
    for _ in range(2):
        assert instead_of(NOWHERE, "engine") == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.iterdir())


def test_none_where_the_own_can_be_written(folder, tmp_path):
    assert instead_of(str(tmp_path / "own"), "engine") is None
    assert not folder.exists()


def test_none_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/null")
    assert instead_of(NOWHERE, "engine") is None


def test_none_that_others_could_write(folder, tmp_path):
    folder.mkdir()
    folder.chmod(0o777)
    assert instead_of(NOWHERE, "engine") is None
    folder.rmdir()
    (tmp_path / "another").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "another")
    assert instead_of(NOWHERE, "engine") is None
