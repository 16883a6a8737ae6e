"""What tests need: REQUIRE, and no skip beside the table."""

import os
import re
import subprocess
import sys

import pytest

from needs import NEEDS, ROOT, here, required

TESTS = """
import pytest
from needs import need, needs

@needs("wheel")
def test_marked(): pass

def test_within(): need("wheel")

@pytest.mark.parametrize("n", [])
def test_of_nothing(n): pass

def test_beside(): pytest.skip("no mood for it")
"""


@pytest.fixture
def outcomes(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  needs\n  long\n")
    (tmp_path / "test_some.py").write_text(TESTS)

    def run(require: str) -> tuple[dict[str, str], str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        env |= {"PYTHONPATH": str(ROOT / "tests"), "REQUIRE": require}
        env.pop("WHEEL", None)
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-rs", "."]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        said = done.stdout + done.stderr
        found = re.findall(r"::(test_\w+)\S* (PASSED|SKIPPED|FAILED|ERROR)", said)
        return {name: outcome.replace("ERROR", "FAILED") for name, outcome in found}, said

    return run


@pytest.mark.parametrize(
    ("require", "outcome"),
    [("", "SKIPPED"), ("wheel", "FAILED"), ("all", "FAILED"), ("all -wheel", "SKIPPED")],
)
def test_what_is_required_fails_and_other_skips_do(outcomes, require, outcome):
    found, said = outcomes(require)
    assert found == {
        "test_marked": outcome,
        "test_within": outcome,
        "test_of_nothing": "FAILED",
        "test_beside": "FAILED",
    }
    assert NEEDS["wheel"].reason in said


def test_a_name_that_is_not_in_the_table_is_an_error(outcomes):
    _, said = outcomes("all -no-such-thing")
    assert "REQUIRE: no-such-thing: " in said


def test_what_is_required_by_name_is_here():
    for name in required() & {*os.environ.get("REQUIRE", "").split()}:
        assert here(name), NEEDS[name].reason


def test_each_reason_is_in_the_docs():
    page = (ROOT / "docs" / "testing.md").read_text()
    found = {
        name: reason
        for names, reason in re.findall(r"((?:`[\w-]+`(?:, )?)+): ([^;]+?)[;.](?=\s)", page)
        for name in re.findall("[\\w-]+", names)
    }
    assert found == {name: need.reason for name, need in NEEDS.items()}
