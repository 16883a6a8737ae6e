"""torch compiles for the processor's vectors without trials, unless somebody asks for them."""

from inspect import getsource

import pytest
from torch._inductor import config

from qwen3next_plugin.machine.compiler import TORCH_SETTING, skip_trials


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


@pytest.mark.compat
def test_torch_reads_the_variable() -> None:
    """Once, as it is imported; "1" skips trials, and what is no number leaves them."""
    assert f'vec_isa_ok: bool | None = get_tristate_env("{TORCH_SETTING}")' in getsource(config)
