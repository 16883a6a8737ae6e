"""`qwen3next warmup` compiles Triton kernels for processors that are not here."""

import os
import subprocess
import sys

import pytest

from command_line import run
from qwen3next_plugin.extras.command_line import warmup
from qwen3next_plugin.kernels.gpu.compiling import TARGETS
from qwen3next_plugin.kernels.gpu.configs import CONFIGS


def test_warmup_knows_every_architecture_that_has_a_configuration():
    assert warmup.ARCHITECTURES == tuple(CONFIGS) == tuple(TARGETS)


def test_warmup_refuses_an_architecture_by_name(released):
    done = run("warmup", released, "--arch", "sm_70")
    assert done.exit_code == 1
    assert "--arch sm_70: use one of sm_80" in done.output


@pytest.mark.long
@pytest.mark.slow
def test_warmup_compiles_for_an_architecture_that_is_not_here(released, tmp_path):
    """In a process of its own; what it has compiled is not compiled again."""
    start = "from qwen3next_plugin.cli import app; app()"
    command = [sys.executable, "-c", start, "warmup", str(released)]
    command += ["--arch", "gfx942", "--tp", "4", "--num-speculative-tokens", "3"]
    cache = tmp_path / "cache"
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache), "COLUMNS": "300"}
    once = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert once.returncode == 0, once.stderr
    names = "_copy_pages, _output_gate, _qk_norm_rope, _rms_norm, _router, _shared_expert_gate, "
    assert f"gfx942: {names}" in once.stdout
    binaries = {path: path.stat().st_mtime_ns for path in cache.rglob("*.hsaco")}
    compiled = {path.stem for path in binaries}
    assert {"short_rows", "segment_starts", "chunk_scan", "commit"} <= compiled
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert binaries == {path: path.stat().st_mtime_ns for path in cache.rglob("*.hsaco")}
