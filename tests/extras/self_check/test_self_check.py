"""The self-check at start passes right kernels, names a wrong one, and keeps its verdict."""

import json
import os
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from checkpoints import BASE, SHAPES
from needs import needs
from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines import extras
from qwen3next_plugin.extras.self_check.cases import Served, cases
from qwen3next_plugin.extras.self_check.checking import (
    KernelError,
    check_kernels,
    compare,
    deviation,
)
from qwen3next_plugin.extras.self_check.findings import findings
from qwen3next_plugin.extras.self_check.verdicts import Verdict, kept, key_of, passed
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.model.state import PageLayout
from released import RELEASED_80B
from tiers import long_except

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def served(changes: dict | None = None, *, drafts: int = 2, dtype=torch.float32) -> Served:
    config = Qwen3NextConfig.from_hf(BASE | (changes or {}))
    layout = PageLayout.from_config(
        config, num_drafts=drafts, activation_dtype=dtype, state_dtype=torch.float32
    )
    return Served(config, layout, CPU)


NATIVE_OPS = tuple(cases(served(), "cpu"))
OF_AN_EXTRA = {
    *("dilated_conv1d", "hyper_connection", "index_keys", "ngram_embedding", "ple_gate"),
    "select_blocks",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "qwen3next_plugin" / "self-check"


def check(of: Served) -> list[str]:
    """The lines that a start logs."""
    lines: list[str] = []
    check_kernels(of.config, of.layout, of.device, lines.append)
    return lines


@pytest.mark.parametrize("dtype", DTYPES)
def test_our_kernels_agree(backend, dtype):
    compare(served(dtype=dtype))


@pytest.mark.parametrize("changes", [*SHAPES.values(), {"num_experts": 0}])
@pytest.mark.parametrize("drafts", [0, 3])
def test_any_shape_agrees(native_level, changes, drafts):
    compare(served(changes, drafts=drafts))


def test_every_op_that_serves_is_compared():
    inside = {"causal_conv1d", "gated_delta_rule", "rms_norm_gated"}  # of gated_delta_net
    made_of_others = {"norm_linear", "sparse_moe"}
    compared = {*dispatch.OPS} - inside - made_of_others - OF_AN_EXTRA
    assert {*NATIVE_OPS} == compared
    assert {*cases(served(), "triton")} == compared - {*dispatch.NOT_IN_TRITON}


def made_wrong(monkeypatch, op: str, spoil) -> None:
    """Let `spoil(right, arguments)` run instead of this native op, with the right one."""
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    right = dispatch.implementation(op, CPU)
    monkeypatch.setitem(
        dispatch._LOADED, ("cpu", "cpu", op), lambda *arguments: spoil(right, arguments)
    )


def tensors(value) -> list[torch.Tensor]:
    """All floating-point tensors, or else whole numbers, in results and arguments."""
    found = value if isinstance(value, tuple | list) else [value]
    flat = [t for item in found for t in ([item] if isinstance(item, torch.Tensor) else ())]
    return [t for t in flat if t.is_floating_point()] or flat


@pytest.mark.parametrize("op", NATIVE_OPS)
def test_a_wrong_kernel_is_named(monkeypatch, op):
    def spoil(right, arguments):
        result = right(*arguments)
        in_place = {  # the argument that the op computes, if it returns nothing
            "copy_pages": 0,
            "gated_delta_net": -1,
            "output_gate": 0,
            "shared_expert_gate": -2,
        }
        for out in tensors(arguments[in_place[op]] if op in in_place else result):
            if out.is_floating_point():
                out[-1:] *= 1.1
            else:
                out[-1:] += 1
        return result

    made_wrong(monkeypatch, op, spoil)
    of = served()
    with pytest.raises(KernelError, match=rf"{op}, .*: differs by .*QWEN3NEXT_DISABLE=1") as error:
        check(of)
    assert "QWEN3NEXT_ISA=baseline" in str(error.value)
    (verdict,) = kept()
    assert verdict.error == str(error.value)


def test_the_state_is_compared_too(monkeypatch):
    """A layer whose output is right, but which spoils S, is wrong in the next step."""

    def spoil(right, arguments):
        right(*arguments)
        arguments[2].state.mul_(1.5)

    made_wrong(monkeypatch, "gated_delta_net", spoil)
    with pytest.raises(KernelError, match=r"gated_delta_net, (drafts|single).*differs"):
        check(served())


def test_a_kernel_that_does_not_run_is_named(monkeypatch):
    def spoil(right, arguments):
        raise RuntimeError("out of resources")

    made_wrong(monkeypatch, "router", spoil)
    with pytest.raises(KernelError, match="router, after its first input: out of resources"):
        check(served())


def test_a_bad_row_must_be_reported(monkeypatch):
    def spoil(right, arguments):
        step = arguments[3]
        if step.slot[0] < len(arguments[2].span):
            right(*arguments)

    made_wrong(monkeypatch, "gated_delta_net", spoil)
    with pytest.raises(KernelError, match="a slot that is not there: it was not reported"):
        check(served())


@pytest.mark.slow
@pytest.mark.parametrize("op", long_except(("gated_delta_net",), cases(served(), "triton")))
def test_a_wrong_triton_kernel_is_named(monkeypatch, op):
    import interpreter

    monkeypatch.setenv("QWEN3NEXT_KERNELS", "triton")
    with interpreter.interpreting():
        right = dispatch.implementation(op, CPU)

        def wrong(*arguments):
            result = right(*arguments)
            in_place = arguments[0] if op != "gated_delta_net" else arguments[-1]
            if op == "shared_expert_gate":
                in_place = arguments[-2]
            for out in tensors(in_place if result is None else result):
                out.copy_(out.flip(0))
            return result

        monkeypatch.setitem(dispatch._LOADED, ("triton", "cpu", op), wrong)
        with pytest.raises(KernelError, match=rf"^Triton kernels are wrong .*: {op}, .*differs"):
            check(served(drafts=1))


def test_a_verdict_is_kept_for_the_same_kernels_only(monkeypatch, cache):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    (line,) = check(served())
    assert "kernels agree with their references, checked in" in line
    assert check(served()) == []
    assert len(check(served(drafts=1))) == 1
    assert len(check(served({"hidden_size": 128}))) == 1
    assert len(check(served(dtype=torch.bfloat16))) == 1
    assert len([*kept()]) == 4
    for file in cache.glob("*.json"):
        file.write_text(json.dumps({"device": "another"}) if file.stat().st_size % 2 else "[")
    assert [*kept()] == []
    assert len(check(served())) == 1


def test_a_failed_check_is_made_again(monkeypatch):
    with monkeypatch.context() as broken:
        made_wrong(broken, "rms_norm", lambda right, arguments: right(*arguments) * 2)
        for _ in range(2):
            with pytest.raises(KernelError, match="rms_norm"):
                check(served())
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    assert len(check(served())) == 1
    assert [verdict.error for verdict in kept()] == [""]


@pytest.mark.parametrize(
    "change",
    [
        *({"at": at} for at in (5, None, "", "yesterday", "2026-01-01T00:00:00")),
        *({"seconds": "1"}, {"key": []}, {"error": 3}, {"more": 1}),
    ],
    ids=str,
)
def test_what_is_no_verdict_is_skipped(cache, change):
    subject = {"device": "cpu", "kernels": "cpu"}
    Verdict.now(subject, 0.1).keep()
    whole = json.loads((cache / f"{key_of(subject)}.json").read_text())
    (cache / "other.json").write_text(json.dumps(whole | change))
    for name, text in (("list", "[]"), ("deep", "[" * 10**6), ("text", "\udcff")):
        (cache / f"{name}.json").write_text(text, errors="surrogateescape")
    os.mkfifo(cache / "pipe.json")
    (verdict,) = kept()
    assert (verdict.key, verdict.age) == (key_of(subject), "just now")
    ahead = datetime.now(UTC) + timedelta(days=2)
    assert replace(verdict, at=ahead.isoformat()).age == "just now"
    assert passed(subject)


def test_without_a_place_to_write_each_start_checks(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert len(check(served())) == len(check(served())) == 1


@pytest.mark.parametrize(
    ("variable", "value"), [("QWEN3NEXT_SELF_CHECK", "0"), ("QWEN3NEXT_KERNELS", "reference")]
)
def test_nothing_is_compared_if_not_asked(monkeypatch, variable, value):
    made_wrong(monkeypatch, "rms_norm", lambda right, arguments: right(*arguments) * 2)
    monkeypatch.setenv(variable, value)
    assert check(served()) == []
    assert [*kept()] == []


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_SELF_CHECK", "no")
    with pytest.raises(env.EnvError, match="QWEN3NEXT_SELF_CHECK='no' is not allowed; use one of"):
        env.check()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_each_engine_checks_before_it_loads(monkeypatch, engine):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    of, lines = served(), list[str]()
    extras.before_load(engine, of.config, of.layout, of.device, lines.append)
    assert len(lines) == len([*kept()]) == 1


def test_doctor_shows_the_last_check(monkeypatch):
    (none,) = findings()
    assert none.found == "none yet: an engine makes one when it first loads a model"
    with monkeypatch.context() as broken:
        made_wrong(broken, "rms_norm", lambda right, arguments: right(*arguments) * 2)
        with pytest.raises(KernelError):
            check(served())
        (wrong,) = findings()
    assert (wrong.subject, wrong.status) == ("this processor", "broken")
    assert wrong.found.endswith("kernels disagree with their references, checked just now")
    assert "rms_norm" in wrong.fix


def test_deviation_sees_one_wrong_vector():
    ref = torch.ones(1000, 8)
    out = ref.clone()
    assert deviation(out, ref) == 0
    out[7] += 0.5
    assert deviation(out, ref) == pytest.approx(0.5)
    out[7, 0] = torch.nan
    assert not deviation(out, ref) <= 1e9
    assert deviation(torch.tensor([1, 2]), torch.tensor([1, 3])) == torch.inf
    assert deviation(torch.full((1, 4), 1e-3), torch.zeros(1, 4)) > 0


@needs("x86-64")
def test_the_released_sizes_take_little_processor_time():
    """Measured: 0.5 s on an EPYC, where it takes 0.3 s of two cores."""
    config = Qwen3NextConfig.from_hf(RELEASED_80B)
    layout = PageLayout.from_config(
        config, num_drafts=3, activation_dtype=torch.bfloat16, state_dtype=torch.float32
    )
    before = time.process_time()
    compare(Served(config, layout, CPU))
    assert time.process_time() - before < 10
