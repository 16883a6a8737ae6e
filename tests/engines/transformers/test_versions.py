"""`generate` with drafts under later transformers than the engines allow."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OTHERS = [path.parent for path in sorted(ROOT.glob(".transformers/*/.installed"))]


@pytest.mark.long
@pytest.mark.parametrize("version", OTHERS, ids=lambda path: path.name)
def test_another_transformers_answers_the_same(version):
    own = [Path(__file__).with_name(f"test_{of}.py") for of in ("linear_attention", "generate")]
    tests = map(str, [*own, *ROOT.glob("tests/extras/*/transformers")])
    command = [sys.executable, "-m", "pytest", "-q", *tests]
    environment = os.environ | {"PYTHONPATH": str(version)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
