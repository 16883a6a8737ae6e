"""torch compiles for the processor's vectors without trials, unless somebody asks for them."""

import os
import subprocess
import sys

import pytest
from torch._inductor import config

from qwen3next_plugin.engines.compiler import TORCH_SETTING, skip_trials


@pytest.mark.parametrize(
    ("machine", "given", "kept", "skipped"),
    [
        pytest.param("x86_64", None, "1", True, id="by default"),
        pytest.param("x86_64", "try", "try", None, id="asked for"),
        pytest.param("aarch64", None, None, None, id="ARM, whose compiler may lack SVE"),
    ],
)
def test_trials_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    given: str | None,
    kept: str | None,
    skipped: bool | None,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    environ = {} if given is None else {TORCH_SETTING: given}
    monkeypatch.setattr("os.environ", environ)
    with config.patch({"cpp.vec_isa_ok": None}):
        skip_trials()
        assert config.cpp.vec_isa_ok is skipped
    assert environ.get(TORCH_SETTING) == kept


@pytest.mark.parametrize(("value", "read"), [("1", "True"), ("try", "None")])
def test_torch_reads_the_variable(value: str, read: str) -> None:
    code = "from torch._inductor import config; print(config.cpp.vec_isa_ok)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=os.environ | {TORCH_SETTING: value}, stdout=subprocess.PIPE)
    assert found.stdout.decode().strip() == read
