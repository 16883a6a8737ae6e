"""Runs the `qwen3next` command in this process."""

from typing import Any

from typer.testing import CliRunner

from qwen3next_plugin.cli import app


def run(*arguments: object) -> Any:
    """Of a wide terminal without colours."""
    return CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"}).invoke(app, list(map(str, arguments)))
