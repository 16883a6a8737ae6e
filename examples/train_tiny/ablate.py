"""Short runs, each with one part of the recipe turned off: see --help."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer

from .corpus import documents, split
from .evaluate import KINDS, expert_shares, held_out_windows, norm_weights
from .export import load
from .kept import keep
from .recipe import RouterTap

VARIANTS = {
    "recipe": [],
    "micro-batch balance": ["--no-global-balance"],
    "no balance loss": ["--balance-weight", "0"],
    "no decay on norms": ["--no-norm-decay"],
}


def train(name: str, out: Path, steps: int) -> Path:
    """Train one variant with train.py; returns its checkpoint folder."""
    folder = out / name.replace(" ", "-")
    size = ["--rows", "1", "--length", "256", "--accumulate", "4", "--no-compiled"]
    size += ["--log-every", "1"]
    command = [sys.executable, "-m", f"{__package__}.train", "--out", str(folder)]
    subprocess.run([*command, "--steps", str(steps), *size, *VARIANTS[name]], check=True)
    return folder


def measure(folder: Path) -> dict:
    """A variant's expert use, norm weights and last losses."""
    model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tap = RouterTap(model)
    _, held_out = split(documents())
    shares = {}
    for kind in KINDS:
        docs = [d for d in held_out if d.kind == kind]
        shares[kind] = expert_shares(model, tap, held_out_windows(tokenizer, docs, 8192))
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    tail = log[-20:]
    return {
        "steps": log[-1]["step"],
        "tokens": log[-1]["tokens"],
        "lm": sum(r["lm"] for r in tail) / len(tail),
        "balance": sum(r["balance"] for r in tail) / len(tail),
        "experts": shares,
        "norm_weights": norm_weights(model),
    }


def main(
    work: Annotated[Path, typer.Option(help="Scratch folder for the variants' checkpoints.")],
    out: Annotated[Path, typer.Option(help="Folder to write ablations.json into.")],
    steps: Annotated[int, typer.Option(help="Steps of each variant.")] = 100,
) -> None:
    """Train each variant from the same seed on the same batches of 4 x 256 tokens, and compare.

    Single runs of few steps on small batches: small differences between them may be noise.
    """
    torch.set_num_threads(1)
    measured = {}
    for name in VARIANTS:
        measured[name] = measure(train(name, work, steps))
        keep(out / "ablations.json", measured)


if __name__ == "__main__":
    typer.run(main)
