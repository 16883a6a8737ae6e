"""Run the same prompts with and without MTP: the text stays the same, the speed changes."""

import time
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

PROMPTS = [
    "import os\n\n\ndef walk(top):\n",
    "class Stack:\n    def __init__(self):\n",
    "def read_lines(path):\n    with open(path) as",
    "The Python standard library",
]
PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos"
DRAFTS = "vllm:spec_decode_num_drafts"


@dataclass(frozen=True)
class Run:
    """One engine's output, its time, and the acceptance of each draft position."""

    tokens: list[list[int]]
    texts: list[str]
    seconds: float
    acceptance: list[float]

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


def main(
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, or a name on the hub.")
    ] = "examples/qwen3next-tiny",
    draft_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens the MTP head drafts in each step.")
    ] = 2,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate for each prompt.")] = 96,
    dtype: Annotated[
        str, typer.Option(help="float32: equal token for token. bfloat16: near ties may flip.")
    ] = "float32",
    cache_gib: Annotated[int, typer.Option(help="Memory for keys, values and states.")] = 1,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile first: a slower start, faster steps.")
    ] = False,
) -> None:
    """Serve one prompt at a time twice, without and with MTP, and show both.

    The MTP head drafts tokens. The model verifies all of them in one step and
    keeps those that it would have chosen itself. So the text is the same, and
    only the number of steps changes.

    The acceptance of a position is the share of drafts whose token was kept
    there. A draft is kept up to its first wrong token, so acceptance falls
    with the position. The exit status is 1 if a text differs.
    """
    options = {
        "model": model,
        "dtype": dtype,
        "max_model_len": 2048,
        "kv_cache_memory_bytes": cache_gib << 30,
        "enforce_eager": not compiled,
        "disable_log_stats": False,
    }
    mtp = {"method": "mtp", "num_speculative_tokens": draft_tokens}
    without = run(max_tokens, options)
    with_mtp = run(max_tokens, options | {"speculative_config": mtp})
    console = Console()
    console.print(side_by_side(without, with_mtp))
    console.print(summary(without, with_mtp))
    raise typer.Exit(code=without.tokens != with_mtp.tokens)


def run(max_tokens: int, options: dict) -> Run:
    """Start an engine, generate prompt by prompt, and shut it down."""
    from vllm import LLM, SamplingParams  # slow to import, so not for --help

    llm = LLM(**options)
    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    llm.generate(PROMPTS, SamplingParams(max_tokens=4), use_tqdm=False)  # warm up
    before = counters(llm)
    start = time.perf_counter()
    outputs = [llm.generate(p, sampling, use_tqdm=False)[0].outputs[0] for p in PROMPTS]
    seconds = time.perf_counter() - start
    acceptance = acceptance_between(before, counters(llm))
    llm.llm_engine.engine_core.shutdown()
    tokens = [list(output.token_ids) for output in outputs]
    return Run(tokens, [output.text for output in outputs], seconds, acceptance)


def counters(llm) -> list[int]:
    """The number of drafts so far, and of accepted ones by position; empty without MTP."""
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    if DRAFTS not in metrics:
        return []
    return [metrics[DRAFTS].value, *metrics[PER_POSITION].values]


def acceptance_between(before: list[int], after: list[int]) -> list[float]:
    """The share of drafts accepted at each position between two readings of the counters."""
    if not after:
        return []
    drafts, *accepted = (b - a for a, b in zip(before, after, strict=True))
    return [count / max(drafts, 1) for count in accepted]


def side_by_side(without: Run, with_mtp: Run) -> Table:
    """A row for each prompt: both texts, and whether they agree."""
    table = Table("prompt", "without MTP", "with MTP", "same", show_lines=True)
    rows = zip(PROMPTS, without.texts, with_mtp.texts, without.tokens, with_mtp.tokens, strict=True)
    for prompt, text, text_mtp, tokens, tokens_mtp in rows:
        table.add_row(*map(Text, (prompt, text, text_mtp, agreement(tokens, tokens_mtp))))
    return table


def agreement(a: list[int], b: list[int]) -> str:
    """`yes`, or the first position at which two token sequences differ."""
    if a == b:
        return "yes"
    parts = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return f"up to token {next(parts, min(len(a), len(b)))}"


def summary(without: Run, with_mtp: Run) -> Table:
    """Speed of both runs, with the acceptance that explains it."""
    table = Table("", "tokens/s", "acceptance per position", "tokens a step")
    table.add_row("without MTP", f"{without.tokens_per_second:.1f}", "", "1.00")
    rates = with_mtp.acceptance
    shares = "  ".join(f"{rate:.2f}" for rate in rates)
    speed, per_step = f"{with_mtp.tokens_per_second:.1f}", f"{1 + sum(rates):.2f}"
    table.add_row("with MTP", speed, shares, per_step)
    return table


if __name__ == "__main__":  # vLLM's workers import this file again
    typer.run(main)
