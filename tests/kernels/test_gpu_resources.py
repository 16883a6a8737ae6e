"""Triton kernels compile for any architecture, and none spills; resources.md is up to date."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.gpu.resources import PROCESSORS, Kernel, Served, complaints
from qwen3next_plugin.kernels.gpu.configs import CONFIGS
from released import RELEASED_80B
from tiers import long_except

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "benchmarks" / "gpu" / "resources.md").read_text()
SERVED = Served(3, 1, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Triton's, for all tests here: with --long two compile the same kernels for gfx942."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.long
@pytest.mark.slow
def test_warmup_compiles_for_an_architecture_that_is_not_here(tmp_path, cache):
    """In a process of its own; what it has compiled is not compiled again."""
    (tmp_path / "config.json").write_text(json.dumps(RELEASED_80B))
    start = "from qwen3next_plugin.cli import app; app()"
    command = [sys.executable, "-c", start, "warmup", str(tmp_path)]
    command += ["--arch", "gfx942", "--tp", "4", "--num-speculative-tokens", "3"]
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


@pytest.mark.slow
@pytest.mark.parametrize("arch", long_except(("sm_90",), CONFIGS))
def test_nothing_spills_and_the_page_is_right(arch, cache):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.resources", "--arch", arch],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"**{arch}**" in done.stdout
    assert f"Compiled by Triton {triton.__version__}.\n" in PAGE  # benchmarks.gpu.resources --write
    assert done.stdout.strip() in PAGE


def test_complaints_name_kernel_and_architecture():
    kernels = [
        Kernel("good", 4, 128, 0, 0),
        Kernel("tight", 4, 255, 16, 0),
        Kernel("large", 4, 128, 0, 96 << 10),
    ]
    spills, too_large = complaints("gfx942", SERVED, kernels)
    assert spills.startswith("gfx942: tight spills 16 bytes")
    assert too_large.startswith("gfx942: large does not fit, for its shared memory")


@pytest.mark.parametrize(
    ("arch", "kernel", "expected"),
    [
        ("sm_80", Kernel("", 4, 129, 0, 0), (3, "registers")),
        ("sm_90", Kernel("", 4, 128, 0, 110 << 10), (2, "shared memory")),
        ("sm_100", Kernel("", 4, 40, 0, 0, tensor_columns=256), (2, "tensor memory")),
        ("sm_90", Kernel("", 8, 16, 0, 0), (8, "warps")),
        ("sm_90", Kernel("", 1, 16, 0, 0), (32, "programs")),
        ("gfx942", Kernel("", 4, 366, 0, 57344), (1, "registers")),
        ("gfx942", Kernel("", 1, 24, 0, 0), (32, "warps")),
    ],
)
def test_programs_that_fit(arch, kernel, expected):
    assert kernel.fitting(PROCESSORS[arch]) == expected


@pytest.mark.parametrize(
    ("arch", "sizes", "splits"),
    [
        ("sm_90", (8, 128, 128), True),  # the released model at TP 4
        ("sm_90", (32, 128, 128), False),  # and at TP 1: processors are busy
        ("gfx942", (32, 128, 128), True),
        ("sm_90", (4, 256, 256), False),  # wider keys than a segment's product has room for
    ],
)
def test_long_rows_are_split_where_it_can_pay(arch, sizes, splits):
    assert CONFIGS[arch].splits(*sizes) == splits
