"""Train a very small Qwen3-Next with MTP on the standard library: see --help."""

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from . import recipe as r
from .architecture import TinyQwen3Next, tiny_config
from .batches import LOOK_AHEAD, dialogue_windows, encode, mixed, windows
from .corpus import documents, split, words
from .export import export, load
from .kept import rounded
from .speed import make_fast
from .tokenizer import MARKS, save_tokenizer, train_tokenizer, with_marks
from .tools import dialogues


class Trainer:
    """The model, its optimiser and one step of the recipe."""

    def __init__(self, recipe: r.Recipe, compiled: bool, seed: int, start: Path | None = None):
        torch.manual_seed(seed)
        self.recipe = recipe
        self.model = (continued(start) if start else fresh()).train()
        self.tap = r.RouterTap(self.model)
        self.balance = r.Balance(recipe.global_balance)
        make_fast(self.model, compiled)
        self.head_loss = torch.compile(r.head_loss, dynamic=False) if compiled else r.head_loss
        groups = r.decay_groups(self.model, recipe)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)

    def losses(self, ids: torch.Tensor, depths: int) -> dict[str, torch.Tensor]:
        """All loss terms of one micro-batch, MTP up to `depths`: ids [B, T+LOOK_AHEAD]."""
        model, recipe = self.model, self.recipe
        T = ids.shape[1] - LOOK_AHEAD
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.hidden(r.read(ids[:, :T]))
            lm = self.head_loss(hidden, model.trunk.lm_head.weight, ids[:, 1 : T + 1])
            mtp = r.mtp_losses(model, ids, hidden, depths, self.head_loss)
        balance = self.balance.loss(self.tap.take(), model.config.num_experts_per_tok)
        total = lm + recipe.mtp_weight * sum(mtp) / len(mtp) + recipe.balance_weight * balance
        named = {f"mtp{depth}": value for depth, value in enumerate(mtp, start=1)}
        return {"total": total, "lm": lm, **named, "balance": balance}

    def step(self, micro_batches: list[torch.Tensor], progress: float) -> dict[str, float]:
        """One optimiser step over all micro-batches; returns the mean of each loss."""
        rate = r.learning_rate(progress, self.recipe)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.balance.reset()
        seen: dict[str, list[float]] = {}
        for n, ids in enumerate(micro_batches):
            deep = n % self.recipe.deep_every == 0
            losses = self.losses(ids, self.recipe.mtp_depths if deep else 1)
            (losses["total"] / len(micro_batches)).backward()
            for name, value in losses.items():
                seen.setdefault(name, []).append(value.item())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        means = {name: sum(values) / len(values) for name, values in seen.items()}
        return means | {"lr": rate, "grad_norm": norm.item()}

    def largest_norm_weight(self) -> float:
        """The largest |weight| of the zero-centred norms, which weight decay keeps small."""
        norms = (m for m in self.model.modules() if isinstance(m, r.Qwen3NextRMSNorm))
        return max(m.weight.abs().max().item() for m in norms)


def fresh() -> TinyQwen3Next:
    """Random weights."""
    model = TinyQwen3Next(tiny_config())
    r.normalise_router_rows(model)
    return model


def continued(start: Path) -> TinyQwen3Next:
    """The weights of a checkpoint; the rows of marks that its tokenizer lacks are drawn anew."""
    model = load(start)
    if Tokenizer.from_file(str(start / "tokenizer.json")).token_to_id(MARKS[0]) is None:
        for weight in (model.trunk.model.embed_tokens.weight, model.trunk.lm_head.weight):
            old, rows = weight.data[: -len(MARKS)], weight.data[-len(MARKS) :]
            rows.copy_(old.mean(0) + old.std(0) * torch.randn_like(rows))
    return model


def progress_bar() -> Progress:
    """Loss, tokens a second and time left."""
    return Progress(
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tok/s  left"),
        TimeRemainingColumn(),
    )


def run(
    trainer: Trainer,
    batches: Iterator[torch.Tensor],
    out: Path,
    *,
    steps: int,
    minutes: float,
    accumulate: int,
    snapshot_minutes: float,
    log_every: int,
    stage: str = "train",
) -> None:
    """The training loop: a log line of some steps' means, a snapshot every few minutes."""
    start = snapshot = time.monotonic()
    tokens, since = 0, list[dict[str, float]]()
    with progress_bar() as bar, (out / f"{stage}_log.jsonl").open("w") as log:
        task = bar.add_task("train", total=steps, loss=float("nan"), speed=0.0)
        for step in range(steps):
            progress = max(step / steps, (time.monotonic() - start) / (60 * minutes))
            if progress >= 1:
                break
            micro_batches = [next(batches) for _ in range(accumulate)]
            losses = trainer.step(micro_batches, progress)
            tokens += sum(ids.shape[0] * (ids.shape[1] - LOOK_AHEAD) for ids in micro_batches)
            seconds = time.monotonic() - start
            since.append(losses)
            if len(since) == log_every or step + 1 == steps:
                record = {"step": step + 1, "tokens": tokens, "seconds": seconds}
                record |= means(since) | {"norm": trainer.largest_norm_weight()}
                log.write(json.dumps(rounded(record)) + "\n")
                log.flush()
                since.clear()
            bar.update(task, advance=1, loss=losses["lm"], speed=tokens / seconds)
            if time.monotonic() - snapshot > 60 * snapshot_minutes:
                export(trainer.model, out)
                snapshot = time.monotonic()
    export(trainer.model, out)


def means(steps: list[dict[str, float]]) -> dict[str, float]:
    """Of each term, over the steps that have it."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: statistics.mean(s[name] for s in steps if name in s) for name in names}


def keep_records(start: Path, out: Path) -> None:
    """Copy the log and setup of the run that made the checkpoint, for its card."""
    for name in ("train_log.jsonl", "train_setup.json"):
        if (start / name).exists() and not out.samefile(start):
            shutil.copy(start / name, out)


def prepare_tokenizer(out: Path, texts: Iterable[str], start: Path | None) -> Tokenizer:
    """Learn the tokenizer, or take that of a checkpoint; save it."""
    if start:
        tokenizer = with_marks(Tokenizer.from_file(str(start / "tokenizer.json")))
    else:
        tokenizer = train_tokenizer(texts)
    save_tokenizer(tokenizer, out)
    return tokenizer


def main(
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, tokenizer and log.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Stop after this time; the schedule adapts.")] = 90,
    rows: Annotated[int, typer.Option(help="Windows in a micro-batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens in a window; every 8th is a long one.")] = 512,
    accumulate: Annotated[int, typer.Option(help="Micro-batches in a step.")] = 4,
    snapshot_minutes: Annotated[float, typer.Option(help="Export a snapshot this often.")] = 5,
    compiled: Annotated[
        bool, typer.Option(help="torch.compile: 1.4 times as fast, after two minutes.")
    ] = True,
    global_balance: Annotated[bool, typer.Option(help="Balance over the global batch.")] = True,
    balance_weight: Annotated[float, typer.Option(help="Weight of the balance loss.")] = 0.01,
    norm_decay: Annotated[bool, typer.Option(help="Weight decay on zero-centred norms.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-3,
    start: Annotated[
        Path | None, typer.Option(help="Continue from this checkpoint, with a new optimiser.")
    ] = None,
    tools: Annotated[
        float, typer.Option(help="Share of the micro-batches that are dialogues with tools.")
    ] = 0.0,
    log_every: Annotated[int, typer.Option(help="Steps whose means are a line of the log.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    corpus_percent: Annotated[int, typer.Option(help="Percentage of the corpus to use.")] = 100,
) -> None:
    """Train a 9-million-parameter Qwen3-Next with an MTP layer on a CPU.

    The corpus is the standard library of the Python that runs this; nothing is downloaded. The
    result is an ordinary checkpoint folder for transformers, vLLM and SGLang.

    A first look: python -m examples.train_tiny.train --steps 20 --no-compiled --out /tmp/tiny

    The shipped one: python -m examples.train_tiny.train --out examples/qwen3next-tiny

    Then dialogues that call tools: --start examples/qwen3next-tiny --tools 0.5 --accumulate 2
    --learning-rate 0.0015 --out agent

    total loss = lm + 0.3·mean(mtp at depths 1–3) + balance_weight·balance. Each part of the recipe
    is a function in recipe.py; turn parts off with the switches below and compare.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    recipe = replace(
        r.Recipe(),
        learning_rate=learning_rate,
        global_balance=global_balance,
        balance_weight=balance_weight,
        norm_decay=norm_decay,
    )
    training = split(documents())[0][:: max(1, 100 // corpus_percent)]
    tokenizer = prepare_tokenizer(out, (d.text for d in training), start)
    docs = encode(tokenizer, training)
    sizes = {"documents": len(docs), "tokens": sum(map(len, docs))}
    batch = {"rows": rows, "length": length, "accumulate": accumulate, "threads": threads}
    setup = asdict(recipe) | {"data": sizes, "tools": tools} | batch
    stage = "continued" if start else "train"
    (out / f"{stage}_setup.json").write_text(json.dumps(setup, indent=2) + "\n")
    if start:
        keep_records(start, out)
    rng = np.random.default_rng(seed)
    talks = dialogue_windows(tokenizer, dialogues(seed, words(training)), rows * length)
    run(
        Trainer(recipe, compiled, seed, start),
        mixed(windows(docs, rows, length, rng), talks, tools, rng),
        out,
        steps=steps,
        minutes=minutes,
        accumulate=accumulate,
        snapshot_minutes=snapshot_minutes,
        log_every=log_every,
        stage=stage,
    )


if __name__ == "__main__":
    typer.run(main)
