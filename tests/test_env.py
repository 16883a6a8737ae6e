"""QWEN3NEXT_* variables: defaults, allowed values, and errors that name the fix."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_plugin import env


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith(env.PREFIX):
            monkeypatch.delenv(name)


def test_defaults():
    assert (env.kernels(), env.isa(), env.disabled(), env.optional()) == (
        "auto",
        None,
        False,
        False,
    )
    env.check()


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name, variable in env.VARIABLES.items() for value in variable.allowed],
)
def test_every_allowed_value_is_read(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    env.check()
    read = {
        "QWEN3NEXT_KERNELS": env.kernels,
        "QWEN3NEXT_ISA": env.isa,
        "QWEN3NEXT_DRAFTS": env.drafts,
        "QWEN3NEXT_QUANTISE": env.quantise,
        "QWEN3NEXT_HEAD": env.head,
        "QWEN3NEXT_MMAP": env.mmap,
        "QWEN3NEXT_NGRAM": env.ngram,
        "QWEN3NEXT_BATCH_INVARIANT": env.batch_invariant,
        "QWEN3NEXT_DISABLE": env.disabled,
        "QWEN3NEXT_OPTIONAL": env.optional,
    }[name]()
    assert read == (value == "1" if isinstance(read, bool) else value)


@pytest.mark.parametrize(
    ("name", "value", "reader"),
    [
        ("QWEN3NEXT_KERNELS", "cuda", env.kernels),
        ("QWEN3NEXT_KERNELS", "", env.kernels),
        ("QWEN3NEXT_KERNELS", "CPU", env.kernels),
        ("QWEN3NEXT_ISA", "sse2", env.isa),
        ("QWEN3NEXT_QUANTISE", "int3", env.quantise),
        ("QWEN3NEXT_DISABLE", "true", env.disabled),
        ("QWEN3NEXT_OPTIONAL", "yes", env.optional),
        ("QWEN3NEXT_OPTIONAL", "", env.optional),
        *(
            ("QWEN3NEXT_STEP_SECONDS", value, env.step_seconds)
            for value in ("", "-1", "nan", "inf", "1e3", "one", "1 ", "٣")
        ),
    ],
)
def test_bad_value_names_variable_value_and_allowed(monkeypatch, name, value, reader):
    monkeypatch.setenv(name, value)
    for call in (reader, env.check):
        with pytest.raises(env.EnvError) as raised:
            call()
        message = str(raised.value)
        assert f"{name}={value!r}" in message
        assert all(allowed in message for allowed in env.VARIABLES[name].allowed)


@pytest.mark.parametrize(
    "name",
    [
        *("QWEN3NEXT_SERVICE_HOST", "QWEN3NEXT_SERVICE_PORT", "QWEN3NEXT_SERVICE_PORT_HTTP"),
        *("QWEN3NEXT_PORT", "QWEN3NEXT_PORT_8000_TCP", "QWEN3NEXT_PORT_8000_TCP_ADDR"),
        "QWEN3NEXT_DRAFT_SERVICE_HOST",
    ],
)
def test_variables_of_a_kubernetes_service_are_not_ours(monkeypatch, name):
    monkeypatch.setenv(name, "tcp://10.0.0.5:8000")
    env.check()
    assert not env.in_force()


def test_seconds_are_any_number(monkeypatch):
    assert env.step_seconds() == 1
    for value in ("0", "0.25", "30", "2.0"):
        monkeypatch.setenv("QWEN3NEXT_STEP_SECONDS", value)
        env.check()
        assert env.step_seconds() == float(value)


def test_values_are_read_at_call_time(monkeypatch):
    assert env.kernels() == "auto"
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    assert env.kernels() == "reference"


def test_unknown_variable_names_the_nearest(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_KERNEL", "cpu")
    with pytest.raises(env.EnvError, match=r"QWEN3NEXT_KERNEL is not .* mean QWEN3NEXT_KERNELS"):
        env.check()


def test_unknown_variable_far_from_all_lists_the_known(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_", "1")
    with pytest.raises(env.EnvError, match="QWEN3NEXT_ISA"):
        env.check()


@settings(deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12))
def test_no_other_value_passes(value):
    allowed = env.VARIABLES["QWEN3NEXT_ISA"].allowed
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QWEN3NEXT_ISA", value)
        if value in allowed:
            assert env.isa() == value
        else:
            with pytest.raises(env.EnvError):
                env.isa()
