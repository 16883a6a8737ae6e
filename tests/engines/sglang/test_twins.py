"""The stand-in's operators are the host's own Triton kernels of the same name."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_equal_to_the_host(size):
    """In a process of its own: the interpreter is chosen when the kernels are imported."""
    seeds = size(3, 20)
    done = subprocess.run(
        [sys.executable, "-m", "engines.sglang.twins", str(seeds)],
        env=os.environ | {"TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "0"},
        cwd=TESTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1:] == [f"compared {10 * seeds}"], done.stdout
