"""`qwen3next doctor` on broken installs."""

import copy
import json
from dataclasses import replace

import pytest
from packaging.version import Version
from typer.testing import CliRunner

from command_line import run
from qwen3next_plugin import versions
from qwen3next_plugin.cli import app
from qwen3next_plugin.extras.command_line import doctor
from qwen3next_plugin.extras.command_line.machine import FLAGS, machine

OURS = {
    "kernels": {"cpu": "native, avx512"},
    "vllm": {
        "platform": "cpu",
        "Qwen3NextForCausalLM": "qwen3next_plugin.engines.vllm.model.trunk",
    },
}


NATIVE = "vllm.model_executor.models.qwen3_next"


HEALTHY = {"torch": "2.13.0", "transformers": "5.19.0", "vllm": "0.32.0", "python": "3.11.7"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    """What starts of other tests found out on this machine is not theirs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def diagnose(monkeypatch):
    """Run doctor on a made-up machine: (packages, answers of the probes) → (exit code, report).

    `slim`: ask this machine for what vLLM needs of it.
    """

    def run_doctor(packages=HEALTHY, answers=OURS, *, slim=False):
        def installed(name):
            return Version(packages[name]) if name in packages else None

        monkeypatch.setattr(versions, "installed", installed)
        monkeypatch.setattr(doctor, "installed", installed)
        monkeypatch.setattr(doctor, "_ask", lambda question: copy.deepcopy(answers[question]))
        if not slim:
            monkeypatch.setattr(doctor, "_needs_of_vllm", lambda: iter(()))
        result = run("doctor", "--json")
        report = json.loads(result.stdout)
        assert report["ok"] == (result.exit_code == 0)
        return result.exit_code, {f["subject"]: f for f in report["findings"]}

    return run_doctor


def test_doctor_of_a_healthy_machine(diagnose):
    code, report = diagnose()
    assert code == 0
    assert report["Qwen3NextForCausalLM"]["status"] == "ok"
    assert report["triton"]["status"] == report["sglang"]["status"] == "note"


def test_doctor_says_which_flags_the_kernels_miss(diagnose, monkeypatch):
    """Where VBMI is masked, a machine with AMX is at avx512bf16."""
    found = replace(machine(), flags=tuple(flag for flag in FLAGS if flag != "avx512vbmi"))
    monkeypatch.setattr(doctor, "machine", lambda: found)
    assert diagnose()[1]["flags not there"]["found"] == "avx512vbmi"


@pytest.mark.parametrize(
    ("packages", "subject", "fix"),
    [
        (HEALTHY | {"vllm": "0.31.0"}, "vllm", "vllm>=0.32"),
        (HEALTHY | {"transformers": "4.57.0"}, "transformers", "transformers>=5.16"),
        ({"python": "3.11.7", "torch": "2.13.0", "transformers": "5.19.0"}, "engine", "vllm>="),
        ({"python": "3.11.7", "vllm": "0.32.0", "torch": "2.13.0"}, "transformers", "install"),
    ],
)
def test_doctor_of_wrong_versions(diagnose, packages, subject, fix):
    code, report = diagnose(packages)
    assert (code, report[subject]["status"]) == (1, "broken")
    assert fix in report[subject]["fix"]


def test_doctor_in_a_slim_image(diagnose, monkeypatch):
    """Without libnuma and a compiler, and with Docker's shared memory."""

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(doctor.ctypes, "CDLL", missing)
    monkeypatch.setenv("CXX", "no-such-g++")
    monkeypatch.setattr(doctor, "MESSAGES_MIB", 1 << 30)
    code, report = diagnose(slim=True)
    fixes = {"libnuma": "libnuma1", "compiler": "--enforce-eager", "/dev/shm": "--shm-size"}
    assert code == 1
    for subject, fix in fixes.items():
        assert (report[subject]["status"], report[subject]["section"]) == (
            "broken",
            "vLLM on a CPU",
        )
        assert fix in report[subject]["fix"]


def test_doctor_when_vllm_keeps_its_own_model(diagnose, monkeypatch):
    native = OURS | {"vllm": {"platform": "cpu", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert code == 1
    assert "VLLM_PLUGINS" in report["Qwen3NextForCausalLM"]["fix"]
    monkeypatch.setenv("QWEN3NEXT_DISABLE", "1")
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (0, "note")


SGLANG = {name: found for name, found in HEALTHY.items() if name != "vllm"} | {"sglang": "0.5.23"}


def test_doctor_of_a_machine_with_sglang(diagnose, monkeypatch):
    model = "Qwen3NextForCausalLM"
    ours = "qwen3next_plugin.engines.sglang.model.trunk"
    answers = OURS | {"sglang": {"platform": "cpu", model: ours}}
    code, report = diagnose(SGLANG, answers)
    assert (code, report[model]["status"], report[model]["found"]) == (0, "ok", ours)
    assert report[model]["section"] == "registration in SGLang"
    answers["sglang"][model] = "sglang.srt.models.qwen3_next"
    code, report = diagnose(SGLANG, answers)
    assert code == 1
    assert "SGLANG_PLUGINS" in report[model]["fix"]
    code, report = diagnose(SGLANG, answers | {"sglang": "no answer in 300 s"})
    assert code == 1
    assert report["sglang"]["fix"].endswith("to run SGLang without this plugin")


def test_doctor_on_a_device_without_kernels(diagnose):
    native = OURS | {"vllm": {"platform": "xpu", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (0, "note")
    assert "does not serve it on xpu" in report["Qwen3NextForCausalLM"]["found"]


def test_doctor_on_a_gpu_that_vllm_should_serve_with_the_plugin(diagnose):
    native = OURS | {"vllm": {"platform": "cuda", "Qwen3NextForCausalLM": NATIVE}}
    code, report = diagnose(answers=native)
    assert (code, report["Qwen3NextForCausalLM"]["status"]) == (1, "broken")


def test_doctor_when_a_probe_fails(diagnose):
    code, report = diagnose(answers={"kernels": "died of signal 4", "vllm": "no answer in 300 s"})
    assert code == 1
    assert report["cpu"]["found"] == "died of signal 4"
    assert report["vllm"]["fix"].endswith("to run vLLM without this plugin")


def test_doctor_of_a_refused_variable_asks_nothing_more(diagnose, monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_ISA", "mmx")
    code, report = diagnose(answers={})
    assert code == 1
    assert "QWEN3NEXT_ISA='mmx'" in report["QWEN3NEXT_*"]["fix"]


def test_doctor_prints_table_and_mend(diagnose, monkeypatch):
    diagnose()
    monkeypatch.setattr(doctor, "_ask", lambda question: "[Errno 2] no such file")
    result = run("doctor")
    assert result.exit_code == 1
    assert "[Errno 2] no such file" in result.output
    assert "build and install the plugin again" in result.output


def test_doctor_cuts_no_name_on_a_narrow_terminal(diagnose, monkeypatch):
    diagnose()
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["doctor"])
    assert "QWEN3NEXT_BATCH_INVARIANT" in result.output


def test_probe_reports_the_last_line_of_a_failure(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "no such backend")
    assert "QWEN3NEXT_KERNELS='no such backend' is not allowed" in doctor._ask("kernels")


def test_doctor_here():
    result = run("doctor", "--json")
    assert result.exit_code == 0, result.stdout


def test_a_quota_counts_as_cores_of_the_machine(grant):
    grant("0::/\n", {"cpu.max": "100000 100000"})
    assert machine().cores == 1
