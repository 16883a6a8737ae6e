"""The patched interpreter passes its self-check, under every Triton that we support."""

import os
import subprocess
import sys
from pathlib import Path

import interpreter
import pytest

ROOT = Path(__file__).parents[2]
INSTALLED = sorted((ROOT / ".triton").glob("*/.installed"))  # by `make test`
VERSIONS = [path.parent for path in INSTALLED]


def test_mended():
    with interpreter.interpreting():
        interpreter.self_check()


def test_the_check_finds_what_is_not_mended():
    code = "import interpreter; interpreter.self_check()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode != 0
    assert b"self_check" in done.stderr


def under(version: Path, *command: str, **env: str) -> str:
    """Output of a Python process that imports this Triton."""
    environment = os.environ | {"PYTHONPATH": str(version)} | env
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # `make check` may run before `make test` has installed them
def test_other_tritons_are_there():
    assert VERSIONS, "make test installs them"


@pytest.mark.long
@pytest.mark.parametrize("version", VERSIONS, ids=lambda path: path.name)
def test_kernels_under_another_triton(version):
    assert version.name in under(version, "-c", "import triton; print(triton.__version__)")
    ignored = "--ignore=tests/kernels/test_interpreter.py"
    said = under(version, "-m", "pytest", "-q", "tests/kernels", ignored, "-k", "triton")
    assert " passed" in said
