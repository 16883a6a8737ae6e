"""The `qwen3next` program: commands that extras declare, and what it says where there are none."""

import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from qwen3next_plugin.cli import make_app
from qwen3next_plugin.commands import Command, commands
from qwen3next_plugin.config import ConfigError


def ping(error: str = "") -> None:
    """Answer, or fail."""
    if error == "ours":
        raise ConfigError("a = 1: use 2")
    if error:
        raise ValueError("a bug")
    typer.echo("pong")


def run(found, *arguments):
    """Exit status, and output as one line without the frames of boxes."""
    done = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(make_app(found), arguments)
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


ONE = [Command(ping, "Example: qwen3next ping.")]


def test_a_single_command_keeps_its_name():
    assert run(ONE, "ping") == (0, "pong")
    assert "Answer, or fail." in run(ONE)[1]
    assert "Example: qwen3next ping." in run(ONE, "ping", "--help")[1]


def test_what_no_extra_has_is_refused_by_name():
    code, said = run(ONE, "unpack")
    assert code == 2
    assert "No such command 'unpack': the extras here have ping" in said
    assert "No such command 'pingg'. Did you mean 'ping'?" in run(ONE, "pingg")[1]


def test_without_extras():
    code, said = run([])
    assert code == 1
    assert said.startswith("qwen3next: no extra in /")
    code, said = run([], "plan", "--tp", "2")
    assert code == 2
    assert "No such command 'plan': no extra in " in said


def test_errors_of_ours_are_one_line():
    assert run(ONE, "ping", "--error", "ours") == (1, "qwen3next: a = 1: use 2")
    with pytest.raises(ValueError, match="a bug"):
        CliRunner().invoke(make_app(ONE), ["ping", "--error", "bug"], catch_exceptions=False)


def test_each_name_is_declared_once():
    names = [command.name for command in commands()]
    assert names == sorted(set(names))


def test_importing_it_is_cheap():
    code = "import sys, qwen3next_plugin.cli\n"
    code += "assert not {'torch', 'vllm', 'sglang', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
