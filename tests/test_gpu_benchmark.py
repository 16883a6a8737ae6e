"""The GPU benchmark checks before it prints, on a CPU too, and times as it says."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import timing
from benchmarks.gpu.check import agree
from qwen3next_plugin.kernels.step import GRID

ROOT = Path(__file__).parents[1]
NO_TOLERANCE = """
import sys
from pathlib import Path
import torch
from benchmarks.gpu import __main__ as gpu, check
check.BOUNDS[torch.float32] = 0.0
gpu.main(smoke=True, out=Path(sys.argv[1]))
"""
SMALL_SEGMENTS = """
import sys
from pathlib import Path
from dataclasses import replace
from qwen3next_plugin.kernels.gpu.configs import CONFIGS
CONFIGS["sm_90"] = replace(CONFIGS["sm_90"], segment=64, split_from=70)
from benchmarks.gpu import __main__ as gpu, cases
agree = cases.agree
cases.agree = lambda what, *others: print(what) or agree(what, *others)
gpu.main(smoke=True, out=Path(sys.argv[1]))
"""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_smoke(tmp_path):
    done = run("-m", "benchmarks.gpu", "--smoke", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| TP")]
    assert {row.split(",")[1].split()[0] for row in rows} == {"decode", "verify", "prefill"}
    for row in rows:
        assert {cell.strip() for cell in row.strip("| ").split(" | ")[1:]} == {"not measured"}
    assert rows[0].split(" | ")[0].strip() in (tmp_path / "gpu-report.md").read_text()


@pytest.mark.long
def test_rows_that_are_split_are_checked_against_unsplit_ones(tmp_path):
    done = run("-c", SMALL_SEGMENTS, str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    compared = [line for line in done.stdout.splitlines() if line.endswith(", unsplit")]
    assert set(compared) == {"TP 2, prefill 9 and 70, unsplit"}


@pytest.mark.long
def test_a_red_check_prints_no_figure_and_is_reported(tmp_path):
    done = run("-c", NO_TOLERANCE, str(tmp_path), TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "red, so there is no figure: TP 2, draft of 0" in done.stderr
    report = (tmp_path / "gpu-report.md").read_text()
    assert "**Red**: TP 2, draft of 0" in report
    assert "- CPU, Triton's interpreter" in report
    (machine,) = re.findall(r"```json\n(.*)```", report, re.DOTALL)
    assert "versions" in {finding["section"] for finding in json.loads(machine)["findings"]}


def test_without_a_gpu_it_says_so():
    done = run("-m", "benchmarks.gpu", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "--smoke" in done.stderr


@pytest.mark.parametrize("wrong", [1.1, float("nan"), float("inf")])
def test_outputs_that_differ_are_red(wrong):
    ref = torch.ones(3)
    agree("same", ref, ref, torch.float32)
    with pytest.raises(AssertionError, match="other: differs"):
        agree("other", torch.tensor([1.0, 1.0, wrong]), ref, torch.bfloat16)


def test_a_time_is_the_median_of_means_over_a_grid(monkeypatch):
    """One round is slow throughout, and in every round the first replay is: S is written."""
    took = itertools.chain.from_iterable(
        [80.0 if i == 1 else 8.0, *[0.0] * (GRID - 1)] for i in range(timing.ROUNDS)
    )

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            pass

        def elapsed_time(self, end):
            return next(took)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing.seconds(lambda: None) == pytest.approx(8.0 / GRID / 1e3)


def test_the_roof_is_what_takes_longer():
    roof = timing.Roof(bandwidth=1e12, rate=1e14)
    assert roof.seconds(1e9, 1e10) == pytest.approx(1e-3)
    assert roof.seconds(1e6, 1e12) == pytest.approx(1e-2)
