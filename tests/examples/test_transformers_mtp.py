"""examples/transformers_mtp.py, as its README says: a script, on the shipped checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


def test_the_script_shows_the_same_text_twice():
    command = [sys.executable, "examples/transformers_mtp.py", "--max-tokens", "16", "import os\n"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.findall(r"^(\w+): [\d.]+ tokens per second$", done.stdout, re.MULTILINE) == [
        "plain",
        "use_mtp",
    ]
    assert "--- 'import os\\n'" in done.stdout
