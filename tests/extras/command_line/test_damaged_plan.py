"""`qwen3next plan` of a damaged checkpoint prints a plan, or one line."""

import json
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import run
from damage import damaged, little_memory, write_file
from model.test_damaged_files import MODEL, document, folder, whole
from qwen3next_plugin.model.checkpoint.headers import INDEX

__all__ = ["document", "folder", "whole"]  # fixtures


def plan(folder: Path) -> None:
    """It prints a plan, or one line, and ends; any other error is raised again."""
    done = run("plan", folder, "--memory", 4)
    if not isinstance(done.exception, SystemExit | None):
        raise done.exception
    if done.stderr:
        assert done.exit_code == 1
        assert done.stderr.startswith("qwen3next: ")


@settings(deadline=None, max_examples=60)
@given(part=st.sampled_from(["config.json", INDEX, MODEL]), data=st.data())
def test_plan_of_a_damaged_checkpoint(whole, folder, document, part, data):
    for name in ("config.json", INDEX, MODEL):
        (folder / name).write_bytes((whole / name).read_bytes())
    header, size = document
    if part == MODEL:
        write_file(folder / MODEL, data.draw(damaged(header)), size)
    else:
        raw = json.loads((whole / part).read_text())
        (folder / part).write_text(json.dumps(data.draw(damaged(raw))))
    with little_memory():
        plan(folder)
    (folder / INDEX).unlink()
