"""`python -m benchmarks.gpu`: the Triton kernels on this machine's GPU."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.origin import commit, version
from benchmarks.render import markdown
from benchmarks.report import Record, RedCheckError, Run, console, shown_unless_red


def card() -> str:
    """The GPU and its driver."""
    import torch

    driver = torch.version.hip or "unknown"
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{torch.cuda.get_device_name()}, driver {driver}"


def measure(run: Run, *, smoke: bool) -> Iterator[Record]:
    """Steps of one layer, checked and timed; a smoke run checks only, on a CPU."""
    import torch

    from benchmarks.gpu import cases, timing

    torch.manual_seed(0)
    device = torch.device("cpu" if smoke else "cuda:0")
    plan = cases.SMOKE if smoke else cases.RELEASED
    with torch.inference_mode():
        roof = None if smoke else timing.roof(device)
        try:
            rows = cases.rows(plan, device, roof)
        except (AssertionError, RuntimeError) as complaint:
            raise RedCheckError(str(complaint)) from complaint
    yield run.record(
        "gpu/layer",
        "How fast is one linear-attention layer?",
        f"a rank's share of the released model's layer; roof: {roof or cases.NOT_MEASURED}",
        cases.UNITS,
        rows,
    )


def origin(*, smoke: bool) -> dict[str, str]:
    """The tree, versions and the card."""
    import torch
    import triton

    from benchmarks.gpu import baselines

    return {
        "commit": f"commit {commit()}",
        "plugin": f"plugin {version('qwen3next_plugin')}",
        "card": "CPU, Triton's interpreter" if smoke else card(),
        "torch": f"torch {torch.__version__}",
        "triton": f"triton {triton.__version__}",
        "baselines": baselines.versions(),
    }


def report(path: Path, source: dict[str, str], records: Sequence[Record], red: str) -> None:
    """Write what others need to know of this run: where, what was found, and the machine."""
    doctor = [
        sys.executable,
        "-c",
        "from qwen3next_plugin.cli import app; app()",
        "doctor",
        "--json",
    ]
    machine = subprocess.run(doctor, capture_output=True, text=True)
    parts = ["# GPU report", "\n".join(f"- {value}" for value in source.values())]
    parts += [f"**Red**: {red}"] if red else []
    for record in records:
        parts += [record.case, markdown([record])]
    parts += [f"```json\n{machine.stdout or machine.stderr}```"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    console.print(f"report: {path}, to attach to an issue", highlight=False)


def main(
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Check on a CPU, interpreted, tiny shapes; no times.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the record.")] = Path("out"),
) -> None:
    """How fast are the Triton kernels on this machine's GPU?

    Measures one linear-attention layer of the released model on each rank's share (TP 1, 2, 4):
    decode, verify and prefill. Each time is set against the roof, which is the card's own speed for
    a large copy and a large product, and against another package's recurrence where one is
    installed (fla-core, vLLM).

    Each step replays a CUDA graph of so many layers that none finds its pages in a cache. A time
    is the median of means over 8 steps, because the state S is written once in 8 tokens.

    The layer is compared with the reference, and each recurrence with a plain loop, before anything
    is printed. On a red check the command exits with 1 and prints no figure. --smoke runs the same
    checks without a GPU. Either way it ends with a report, gpu-report.md, to attach to an issue.
    """
    if smoke:  # before Triton is imported
        os.environ |= {"TRITON_INTERPRET": "1", "QWEN3NEXT_KERNELS": "triton"}
        from tests.kernels import interpreter

        interpreter.fix()
    else:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit("no GPU here; --smoke runs without one")
    run = Run(out, "gpu", origin(smoke=smoke))
    file = out / "gpu-report.md"
    records = shown_unless_red(
        lambda: measure(run, smoke=smoke),
        on_red=lambda complaint: report(file, run.origin, [], complaint),
    )
    report(file, run.origin, records, "")
    for record in records if not smoke else ():
        record.save(out / "parts")


if __name__ == "__main__":
    typer.run(main)
