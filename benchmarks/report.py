"""Turn measured figures into docs/performance.md and its picture."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- make bench: begin -->\n", "<!-- make bench: end -->\n"  # in docs/mtp.md
NOTES = Path(__file__).parent / "notes.md"  # what the figures do not say by themselves
Table = dict[str, dict[str, float]]


def machine() -> dict[str, str]:
    """What a reader must know of the machine that gave the figures."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        "processor": next(
            (line.split(": ")[1] for line in lines if line.startswith("model name")),
            platform.processor(),
        ),
        "cores": str(len(os.sched_getaffinity(0))),
        "instruction sets": ", ".join(flag for flag in wanted if flag in flags),
        "torch": torch.__version__,
    }


def write(results: Path) -> None:
    """Write the page and the picture from a JSON of results."""
    data = json.loads(results.read_text())
    picture(data["engines"], DOCS / "performance.svg")
    (DOCS / "performance.md").write_text(page(data))


def host(data: dict) -> str:
    """The machine in a sentence."""
    return "Machine: " + "; ".join(f"{name}: {value}" for name, value in data["machine"].items())


def page(data: dict) -> str:
    """The Markdown page."""
    parts = [
        "# Performance\n",
        "```console\n$ make bench\n```\n",
        "Plugin and upstream alternate in one run, each in its own process; nothing is printed "
        "unless both compute the same log-probabilities. Figures are from one run unless a note "
        "says otherwise; the ratio of steps is that of the shortest ones.\n",
        f"{host(data)}.\n",
        "## Engine steps\n",
        "The block model: the released model's layer shapes (hidden 2048, 16/32 linear heads of "
        "128, 16/2 attention heads of 256), 4 layers, 64 experts top-10, vocabulary 151,936, "
        "bf16, random weights. A ratio above 1 is in the plugin's favour.\n",
        "![upstream and plugin](performance.svg)\n",
        markdown({k: v for k, v in data["engines"].items() if "memory" not in k}),
        "## Memory\n",
        markdown({k: v for k, v in data["engines"].items() if "memory" in k}),
        "## Start-up\n",
        "`vllm serve --enforce-eager` on the shipped checkpoint.\n",
        markdown({"until ready": data["startup"]}),
        "## Kernels\n",
        "Real shapes, against the operators that upstream calls on this machine.\n",
        markdown(data["kernels"]),
    ]
    return "\n".join([*parts, NOTES.read_text()])


def markdown(table: Table) -> str:
    """Markdown tables, one for each set of columns that rows share."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, row in table.items():
        cells = " | ".join(f"{x:,.0f}" if x >= 1000 else f"{x:.3g}" for x in row.values())
        groups.setdefault(tuple(row), []).append(f"| {name} | {cells} |")
    tables = []
    for columns, rows in groups.items():
        head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        tables.append("\n".join([*head, *rows]) + "\n")
    return "\n".join(tables)


def picture(table: Table, path: Path) -> None:
    """Bars of how many times faster than upstream each step is."""
    rows = {
        name: row["ratio"]
        for name, row in table.items()
        if "ratio" in row and not name.startswith("peak memory")
    }
    with chart(path, (7, 0.45 * len(rows) + 0.8)) as axes:
        bars = axes.barh(list(rows), list(rows.values()), color="#4c72b0")
        axes.bar_label(bars, fmt="%.2f×", padding=3)
        axes.axvline(1, color="#333333", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("times upstream's speed")


@contextmanager
def chart(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes of an SVG with its text as text, the same bytes for the same figures."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": path.name}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
