"""Every command of README and docs: run, or read by what it calls, or a reason why not.

Those of SGLang are read by tests/engines/sglang/test_commands.py, ours by tests of extras.
"""

import os
import runpy
import subprocess
import sys

import pytest

from commands import ROOT, commands, of
from needs import need
from qwen3next_plugin import env

# By page and program.
NOT_RUN = {
    ("README.md", "sudo"): "needs root",
    ("README.md", "pip"): "needs a network",
    ("README.md", "hf"): "downloads from the hub",
    ("README.md", "curl"): "needs a server: tests/engines/*/test_server.py send it to theirs",
    ("docs/fleet.md", "pip"): "needs a network",
    ("docs/fleet.md", "ray"): "needs Ray: tests/engines/vllm/test_ray.py",
    ("docs/fleet.md", "venv"): "is Python's own",
    ("docs/fleet.md", "sglang_router.launch_router"): "tests/engines/*/test_router.py start it",
}
SGLANG = "sglang.launch_server"
CLI = "qwen3next"


def is_script(program: str) -> bool:
    return program.endswith(".py") or program.split(".")[0] in ("benchmarks", "examples")


def test_each_command_is_run_or_has_a_reason():
    known = {"vllm", SGLANG, "make", CLI, "-c", "cd"}
    for command in commands():
        runs = command.program in known or is_script(command.program)
        assert runs != ((command.page, command.program) in NOT_RUN), command


def test_each_reason_is_of_a_command():
    shown = {(command.page, command.program) for command in commands()}
    assert not set(NOT_RUN) - shown


@pytest.mark.parametrize("command", commands(), ids=str)
def test_variables_are_known(monkeypatch, command):
    for name, value in command.variables:
        if name.startswith("QWEN3NEXT_"):
            monkeypatch.setenv(name, value)
    env.check()


@pytest.mark.parametrize("command", of("make"), ids=str)
def test_make_has_the_target(command):
    if not (ROOT / "Makefile").exists():
        pytest.fail("this test is for the checkout")
    clean = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "-n", *command.arguments], cwd=ROOT, env=clean, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of("-c"), ids=str)
def test_python_runs_it(command):
    done = subprocess.run(
        [sys.executable, "-P", *command.words[1:]], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "command", [each for each in commands() if is_script(each.program)], ids=str
)
def test_a_script_has_the_options(monkeypatch, capsys, command):
    """--help reads all options first."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", [command.program, *command.arguments, "--help"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    run = runpy.run_path if command.program.endswith(".py") else runpy.run_module
    with pytest.raises(SystemExit) as ended:
        run(command.program, run_name="__main__")
    assert not ended.value.code, capsys.readouterr().err
    assert "Usage" in capsys.readouterr().out


@pytest.fixture(scope="module")
def vllm_parser():
    """That of `vllm serve`, with what the plugin adds."""
    need("vllm")
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    return make_arg_parser(FlexibleArgumentParser())


@pytest.mark.parametrize("command", of("vllm"), ids=str)
def test_vllm_reads_the_flags(vllm_parser, command):
    assert command.arguments[0] == "serve"
    from vllm.entrypoints.launchers.cli_args import validate_parsed_serve_args

    read = vllm_parser.parse_args(command.arguments[1:])
    validate_parsed_serve_args(read)
    assert read.model_tag == command.arguments[1]
