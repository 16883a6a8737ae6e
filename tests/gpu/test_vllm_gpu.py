"""On real GPUs: vLLM with the plugin serves the shipped checkpoint as fp32 on the CPU does."""

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.checks import check_greedy
from engines.vllm.offline import Offline
from reference import Reference

ROOT = Path(__file__).resolve().parents[2]
DRAFTS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
pytestmark = pytest.mark.serve


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("drafts", [{}, DRAFTS], ids=["plain", "mtp-2"])
def test_greedy_text_is_that_of_fp32_on_a_cpu(gpus, drafts, eager):
    prompts = [random_prompt(n, seed=13) for n in (5, 64, 300)]
    flags = {"dtype": "float32", "max_model_len": 1024, "enforce_eager": eager}
    # vLLM's own kernels would multiply fp32 in TF32.
    exact = {"TRITON_F32_DEFAULT": "ieee"}
    engine = Offline(SHIPPED, tensor_parallel_size=gpus, env=exact, **flags, **drafts)
    try:
        check_greedy(Reference(SHIPPED), prompts, engine.greedy(prompts, 16, logprobs=0))
    finally:
        engine.close()


def test_one_line_names_plugin_and_kernels(gpus):
    command = [sys.executable, "examples/offline.py", "--max-tokens", "16"]
    command += ["--tensor-parallel-size", str(gpus), "import os\n"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    log = done.stdout + done.stderr
    assert "serves this model on vLLM" in log
    assert "with Triton kernels" in log
    assert "--- 'import os\\n'" in done.stdout
