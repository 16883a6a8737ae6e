"""Draw the model card's pictures from measured files: see --help."""

import json
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LOSSES = {"lm": "trunk", "mtp1": "MTP, depth 1", "mtp2": "MTP, depth 2", "mtp3": "MTP, depth 3"}
TASKS = {
    "text": "held-out text",
    "generated_text": "along generated text",
    "generated_chat": "along generated answers",
}


def read_log(folder: Path, stage: str = "train") -> list[dict]:
    """Means of some steps each of the first run, or of the `continued` one."""
    return [json.loads(line) for line in (folder / f"{stage}_log.jsonl").read_text().splitlines()]


def draw_losses(axes: plt.Axes, log: list[dict]) -> None:
    """Every cross entropy against tokens seen."""
    tokens = [record["tokens"] / 1e6 for record in log]
    for key, label in LOSSES.items():
        axes.plot(tokens, [record[key] for record in log], label=label, linewidth=1.2)
    axes.set(xlabel="tokens seen (millions)", ylabel="cross entropy (nats)", title="Training loss")
    axes.legend(frameon=False)


def draw_acceptance(axes: plt.Axes, acceptance: dict) -> None:
    """Acceptance at each draft position, given that the one before was accepted."""
    for n, (task, label) in enumerate(TASKS.items()):
        rates = acceptance[task]["given_previous"]
        bars = axes.bar([p + 0.27 * (n - 1) for p in (1, 2, 3)], rates, width=0.25, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set(xticks=[1, 2, 3], ylim=(0, 1.25), xlabel="draft position", title="MTP acceptance")
    axes.set_ylabel("accepted, given the previous one was")
    axes.legend(frameon=False, fontsize=8)


def draw_experts(axes: plt.Axes, ablations: dict) -> None:
    """Experts sorted by load, averaged over layers, on held-out source text."""
    for name in ("recipe", "micro-batch balance", "no balance loss"):
        layers = [sorted(shares, reverse=True) for shares in ablations[name]["experts"]["source"]]
        mean = [sum(column) / len(layers) for column in zip(*layers, strict=True)]
        axes.plot(range(1, len(mean) + 1), [100 * m for m in mean], marker=".", label=name)
    axes.axhline(100 / len(mean), color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="expert, by load", ylabel="% of routed tokens", ylim=(0, None))
    axes.set_title(f"Expert use after {ablations['recipe']['steps']} steps")
    axes.legend(frameon=False, fontsize=8)


def draw_norms(axes: plt.Axes, log: list[dict], ablations: dict) -> None:
    """The largest zero-centred norm weight in the main run, and the final one of two ablations."""
    records = [record for record in log if "norm" in record]
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["norm"] for record in records], label="main run (with decay)")
    for name, marker in (("recipe", "o"), ("no decay on norms", "x")):
        short = ablations[name]
        label = f"short run: {name}"
        axes.plot(short["steps"], short["norm_weights"]["max"], marker, label=label, markersize=6)
    axes.set(xlabel="step", ylabel="largest |weight|", ylim=(0, None))
    axes.set_title("Zero-centred norm weights")
    axes.legend(frameon=False, fontsize=8)


def save(figure: plt.Figure, path: Path) -> None:
    """Write a small picture."""
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(
    checkpoint: Annotated[Path, typer.Option(help="Folder with the log and the measured files.")],
) -> None:
    """Draw loss.png and recipe.png from train_log.jsonl, measured.json and ablations.json."""
    log = read_log(checkpoint)
    measured = json.loads((checkpoint / "measured.json").read_text())
    ablations = json.loads((checkpoint / "ablations.json").read_text())
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    draw_losses(axes[0], log)
    draw_acceptance(axes[1], measured["acceptance"])
    save(figure, checkpoint / "loss.png")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    draw_experts(axes[0], ablations)
    draw_norms(axes[1], log, ablations)
    save(figure, checkpoint / "recipe.png")


if __name__ == "__main__":
    typer.run(main)
