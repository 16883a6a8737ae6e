"""The workflows: what they run is pinned, ends, and may write only where nothing else runs."""

import re
from itertools import chain
from pathlib import Path

import pytest
import yaml

from needs import ROOT

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PINNED = re.compile(r"actions/[\w-]+@[0-9a-f]{40}")
OURS = re.compile(r"gh (release|issue) create |cd dist && sha256sum ")
pytestmark = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def jobs(path: Path) -> dict[str, dict]:
    return yaml.safe_load(path.read_text())["jobs"]


def test_actions_are_githubs_own_and_pinned_by_commit(path):
    steps = chain.from_iterable(job["steps"] for job in jobs(path).values())
    for step in steps:
        assert "uses" not in step or PINNED.fullmatch(step["uses"]), step


def test_each_job_ends(path):
    assert all(0 < job["timeout-minutes"] <= 360 for job in jobs(path).values())


def test_a_job_that_may_write_runs_no_other_code(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        if "write" in job.get("permissions", {}).values():
            ran = [step["run"] for step in job["steps"] if "run" in step]
            assert all(OURS.match(r) for r in ran)
            assert not [step for step in job["steps"] if "checkout" in step.get("uses", "")]


def test_no_test_is_run_twice(path):
    """`make check` runs tests that `make test` runs, too."""
    for job in jobs(path).values():
        ran = [step["run"].replace("\\\n", " ") for step in job["steps"] if "run" in step]
        made = re.findall(r"make (check|test)(?: |$)(?!.*ARGS=)", "\n".join(ran), re.MULTILINE)
        assert not {"check", "test"} <= set(made), ran
