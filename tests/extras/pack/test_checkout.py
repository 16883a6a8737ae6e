"""`qwen3next pack` as the pages show it."""

import pytest

from command_line import run
from commands import ROOT, of

SHOWN = [command for command in of("qwen3next") if command.arguments[0] == "pack"]


@pytest.mark.parametrize("command", SHOWN, ids=str)
def test_a_command_that_is_shown_runs(tmp_path, monkeypatch, checkpoint, command):
    """Of a checkpoint here, into a folder here; what has MODEL and no options is only read."""
    monkeypatch.chdir(ROOT)
    arguments = command.arguments
    if arguments[1] == "MODEL":
        arguments = [*arguments, "--help"]
    else:
        arguments = ["pack", checkpoint, tmp_path / "packed", *arguments[3:]]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
