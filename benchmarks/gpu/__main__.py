"""The Triton kernels on this machine's GPU, against its own bandwidth and FLA's kernels.

    python -m benchmarks.gpu [--smoke]

One layer of the released model: decode, verify and prefill, on each rank's share. All is checked
before anything is printed. Every step finds its pages out of cache, as many layers take turns;
a time is a median of means over GRID steps, as S is written once in so many.

--smoke runs the same on a CPU in Triton's interpreter, on tiny shapes, and times nothing.
"""

import os
import shutil
import subprocess
import sys
from typing import Annotated

import typer


def card() -> str:
    """The GPU and what drives it."""
    import torch

    driver = torch.version.hip or "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{torch.cuda.get_device_name()}, driver {driver}"


def main(
    smoke: Annotated[bool, typer.Option(help="On a CPU, interpreted; no times.")] = False,
) -> None:
    """Check, measure and print; exits with 1 and no figure on a red check."""
    if smoke:  # before Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "QWEN3NEXT_KERNELS": "triton"}
    import torch
    import triton

    from benchmarks.gpu import baselines, cases, timing

    if smoke:
        from tests.kernels import interpreter

        interpreter.mend()
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU here; --smoke runs without one")
    torch.manual_seed(0)
    device = torch.device("cpu" if smoke else "cuda:0")
    with torch.inference_mode():
        roof = None if smoke else timing.roof(device)
        plan = cases.SMOKE if smoke else cases.RELEASED
        try:
            table = cases.table(plan, device, roof)
        except (AssertionError, RuntimeError) as complaint:
            print(f"red, so there are no figures: {complaint}", file=sys.stderr)
            raise SystemExit(1) from complaint
    print("CPU, Triton's interpreter" if smoke else card())
    print(f"torch {torch.__version__}, triton {triton.__version__}, {baselines.versions()}")
    print(f"roof: {roof or cases.NOT_MEASURED}\n")
    print(table)


if __name__ == "__main__":
    typer.run(main)
