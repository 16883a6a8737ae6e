"""vLLM's caches where there is no home to write to."""

import logging
import os
import stat
from pathlib import Path

import pytest

from qwen3next_plugin.engines.vllm.repairs.caches import ROOT, provide_folder


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """The temporary folder that a user without a home gets."""
    for name in (ROOT, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that the end of the test undoes what is set
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"vllm-{os.getuid()}"


def test_a_temporary_folder_takes_the_place_of_one_that_cannot_be_written(
    folder, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    provide_folder()
    assert f"/dev/null/.cache/vllm cannot be written: vLLM's caches are in {folder}" in caplog.text
    assert os.environ[ROOT] == str(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.iterdir())
    provide_folder()  # what it starts finds it named
    assert os.environ[ROOT] == str(folder)


def test_vllm_has_its_own_folder_in_a_home(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    provide_folder()
    assert ROOT not in os.environ
    assert not folder.exists()


def test_a_named_folder_stays(folder, monkeypatch):
    monkeypatch.setenv(ROOT, "/dev/null/named")
    provide_folder()
    assert os.environ[ROOT] == "/dev/null/named"


def test_a_folder_that_others_could_write_is_not_taken(folder, tmp_path):
    folder.mkdir()
    folder.chmod(0o777)
    provide_folder()
    assert ROOT not in os.environ
    folder.rmdir()
    (tmp_path / "another").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "another")
    provide_folder()
    assert ROOT not in os.environ
