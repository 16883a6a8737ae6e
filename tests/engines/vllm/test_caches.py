"""vLLM's caches where the home cannot be written."""

import logging
import os

import pytest

from qwen3next_plugin.engines.vllm.caches import ROOT, provide_folder


@pytest.fixture(autouse=True)
def no_home(monkeypatch, tmp_path):
    for name in (ROOT, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")  # so that the end of the test undoes what is set
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/dev/null")
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def test_they_are_in_a_temporary_folder(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    folder = f"{tmp_path}/vllm-{os.getuid()}"
    provide_folder()
    assert os.environ[ROOT] == folder
    assert f"/dev/null/.cache/vllm cannot be written: vLLM's caches are in {folder}" in caplog.text


def test_a_named_folder_stays(monkeypatch):
    monkeypatch.setenv(ROOT, "/dev/null/named")
    provide_folder()
    assert os.environ[ROOT] == "/dev/null/named"
