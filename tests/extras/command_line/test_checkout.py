"""Commands against what only the checkout has: pages, sources of kernels, other Tritons."""

import re

import pytest
from test_interpreter import VERSIONS, under

from command_line import run
from commands import ROOT, of
from qwen3next_plugin.extras.command_line.commands import COMMANDS
from qwen3next_plugin.extras.command_line.machine import ARM_FLAGS, X86_FLAGS
from tiers import long_except

HERE = {command.name for command in COMMANDS} | {"--help"}
OF_OTHERS = {"pack"}  # shown, and of another extra
ELSEWHERE = {"doctor", "warmup", "watch"}  # take long or need a server: other tests run them
NEXT_80B = str(ROOT / "examples" / "configs" / "Qwen3-Next-80B-A3B")
SHOWN = of("qwen3next")
# The others than the oldest and the installed one are tested with --long.
OLDEST_FIRST = long_except(VERSIONS[:1], VERSIONS)


def test_each_command_that_is_shown_is_known():
    assert {command.arguments[0] for command in SHOWN} <= HERE | OF_OTHERS


@pytest.mark.parametrize("command", [c for c in SHOWN if c.arguments[0] in HERE], ids=str)
def test_a_command_that_is_shown_runs(monkeypatch, command):
    """`plan` of a model here; of others their options are read."""
    monkeypatch.chdir(ROOT)
    arguments = command.arguments
    if arguments[0] in ELSEWHERE:
        arguments = [*arguments, "--help"]
    elif arguments[0] == "plan":
        arguments = [NEXT_80B if word == "MODEL" else word for word in arguments]
    done = run(*arguments)
    nothing_fits = done.exit_code == 1 and "requests at once" in done.output
    assert done.exit_code == 0 or nothing_fits, done.output


def test_doctor_knows_every_flag_that_the_kernels_ask_for():
    ops = (ROOT / "kernels" / "native" / "ops.cpp").read_text()
    asked = re.findall(r'cpu_supports\("([^"]+)"\)', ops)
    assert asked
    known = {flag.replace("_", "") for flag in X86_FLAGS}
    assert {re.sub("[-_]", "", flag) for flag in asked} <= known
    assert {flag.lower() for flag in re.findall(r"HWCAP2?_(\w+)", ops)} == set(ARM_FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("version", OLDEST_FIRST, ids=lambda path: path.name)
def test_compiled_by_another_triton(version, tmp_path, size):
    """With --long for every architecture."""
    start = "from qwen3next_plugin.cli import app; app()"
    command = ("-c", start, "warmup", "examples/qwen3next-tiny", "--num-speculative-tokens", "2")
    architectures = size(("sm_90",), ("sm_80", "sm_90", "sm_100", "gfx942"))
    chosen = size(("--arch", "sm_90"), ())
    said = under(version, *command, *chosen, TRITON_CACHE_DIR=str(tmp_path), COLUMNS="300")
    assert all(f"{arch}: " in said for arch in architectures)
    assert f"Triton {version.name} has them" in said
