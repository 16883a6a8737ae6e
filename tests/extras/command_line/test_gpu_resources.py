"""Triton kernels compile for any architecture, and none spills; resources.md is up to date."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from benchmarks.gpu.resources import PROCESSORS, Kernel, Served, complaints
from qwen3next_plugin.kernels.gpu.configs import CONFIGS
from tiers import long_except

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "benchmarks" / "gpu" / "resources.md").read_text()
SERVED = Served(3, 1, torch.bfloat16, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("arch", long_except(("sm_90",), CONFIGS))
def test_nothing_spills_and_the_page_is_right(arch, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.resources", "--arch", arch],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
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
