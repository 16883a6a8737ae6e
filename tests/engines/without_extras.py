"""A copy of the tree, without extras or with a bug, which processes import in place of ours."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import qwen3next_plugin.kernels
from engines.server import Server
from qwen3next_plugin import env
from qwen3next_plugin.commands import commands
from qwen3next_plugin.engines import extras
from qwen3next_plugin.kernels.native import LIBRARY

ROOT = Path(__file__).parents[2]
IMPORTED_FIRST = """
import sys

sys.meta_path[:] = [each for each in sys.meta_path if "editable" not in type(each).__module__]
"""


EXTRAS = sorted(path.parent.name for path in extras.FOLDER.glob("*/__init__.py"))


def copy_without(folder: Path, *names: str) -> dict[str, str]:
    """Copy all but these extras, or all of them; the environment in which the copy is imported."""
    copy_tree(folder)
    for place in ("qwen3next_plugin", "tests"):
        for name in names or ("",):
            gone = folder / "tree" / place / "extras" / name
            if gone.exists() or place != "tests":  # an extra may have no tests
                shutil.rmtree(gone)
    return imported_first(folder)


def copy_tree(folder: Path) -> Path:
    """Copy the tree to a folder of a new one; returns it."""
    left_out = shutil.ignore_patterns("__pycache__")
    for name in ("qwen3next_plugin", "kernels", "mtp", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=left_out)
    for name in ("pyproject.toml", "CONTRIBUTING.md", "CMakeLists.txt"):
        shutil.copy(ROOT / name, folder / "tree")
    (folder / "tree" / "examples").symlink_to(ROOT / "examples")  # the small model
    return folder / "tree"


def imported_first(folder: Path) -> dict[str, str]:
    """The environment in which processes import the copy in this folder."""
    package = folder / "path" / "qwen3next_plugin"
    (package / "kernels").mkdir(parents=True)
    for source in (folder / "tree" / "qwen3next_plugin").iterdir():
        (package / source.name).symlink_to(source)
    for source in (*(folder / "tree" / "kernels").iterdir(), _library()):
        (package / "kernels" / source.name).symlink_to(source)
    (package / "mtp").symlink_to(folder / "tree" / "mtp")
    (folder / "path" / "sitecustomize.py").write_text(IMPORTED_FIRST)
    env = {"PYTHONPATH": str(folder / "path"), "PYTHONSAFEPATH": "1"}
    found = [sys.executable, "-c", "import qwen3next_plugin as found; print(found.__file__)"]
    done = subprocess.run(found, env=os.environ | env, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).parent == package
    return env


def _library() -> Path:
    folders = [Path(folder) for folder in qwen3next_plugin.kernels.__path__]
    return next(folder / LIBRARY for folder in folders if (folder / LIBRARY).exists())


def check_refusals(folder: Path) -> None:
    """Variables and commands of extras are refused by name in a copy without them."""
    without = os.environ | copy_without(folder) | {"COLUMNS": "200"}

    def said(code: str, *arguments: str, **variables: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=without | variables, capture_output=True, text=True)
        assert done.returncode != 0
        return done.stderr

    for name in env.variables().keys() - env.VARIABLES.keys():
        refused = said("from qwen3next_plugin import env; env.check()", **{name: "1"})
        assert f"{name} is not a variable of qwen3next_plugin" in refused
    for command in commands():
        refused = said("from qwen3next_plugin.cli import app; app()", command.name)
        assert f"No such command '{command.name}': no extra in" in refused


def check_answers(server: Server, more: Callable[[Server], None] = lambda _: None) -> None:
    """A server that has begun answers; so does `more`."""
    server.wait()
    try:
        answer = server.client.completions.create(
            model=server.model, prompt="The sun is a star.", max_tokens=16, temperature=0
        )
        assert answer.usage.completion_tokens == 16
        more(server)
    finally:
        server.close()


def check_refused(folder: Path, script: str, asked: Sequence[tuple[Any, str]]) -> None:
    """Without extras, what they serve is refused by name.

    Args:
        script: reads what is asked as JSON; prints a line of each error, after "answer: ".
        asked: and the words of each error.
    """
    given = json.dumps([each for each, _ in asked])
    env = os.environ | copy_without(folder)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, input=given, env=env, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("answer: ")]
    assert len(lines) == len(asked), done.stdout[-4000:] + done.stderr[-4000:]
    for line, (_, words) in zip(lines, asked, strict=True):
        assert re.search(words, line), line


def check_suite(folder: Path, *arguments: str, without: Sequence[str] = ()) -> None:
    """These tests pass in a copy without these extras, or without any."""
    env = os.environ | copy_without(folder, *without)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=folder / "tree", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
