"""On a GPU the plugin has no kernels yet: it says so, and the host's own model serves."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(
    params=[pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.multi_gpu)]
)
def gpus(request):
    """The number of GPUs to serve on; skips where the machine has fewer."""
    found = torch.cuda.device_count()
    if found < request.param:
        pytest.skip(f"needs {request.param} GPU(s), found {found}")
    return request.param


@pytest.fixture
def served(gpus):
    """What the offline example prints when it serves the shipped checkpoint on these GPUs."""
    command = [sys.executable, "examples/offline.py", "--max-tokens", "16"]
    command += ["--tensor-parallel-size", str(gpus), "import os\n"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.serve
def test_one_clear_line_and_the_hosts_model_serves(served):
    log = served.stdout + served.stderr
    assert "has no kernels for" in log
    assert "keeps its own Qwen3-Next" in log
    assert "--- 'import os\\n'" in served.stdout
