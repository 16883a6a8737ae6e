"""The tables of `qwen3next plan`."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.memory import granted
from qwen3next_plugin.engines.plan import P, Plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.model.checkpoint.units import readable

TableRow = tuple[str, int, str]  # what, bytes, a note


def bound(p: Plan) -> str:
    """What limits the concurrency, and the fix if it is 0."""
    fits, flags = p.fits, p.flags
    if (weights := sum(p.weights.values())) >= flags.memory:
        return (
            f"the weights: {readable(weights)} do not fit in {readable(flags.memory)}; use more"
            " ranks (--tp), fewer bits, or more memory (--memory)"
        )
    if not fits:
        return p.shortage()
    if fits >= flags.max_num_seqs:
        return f"--max-num-seqs: the memory would hold {fits} requests of this length"
    return f"memory: {fits} of the {flags.max_num_seqs} requests of --max-num-seqs fit"


def by_default(p: P) -> P:
    """What the engine's server does where so much memory is free and no flag says how much."""
    return replace(p, flags=replace(p.flags, memory=granted(p.flags.memory))).with_default_pools()


def print_formats(formats: Mapping[str, Plan]) -> None:
    """Which formats fit."""
    from rich.console import Console
    from rich.table import Table

    table = Table("format", title="what fits")
    table.add_column("weights", justify="right")
    table.add_column("requests at once", justify="right")
    for name, each in formats.items():
        table.add_row(name, readable(sum(each.weights.values())), str(each.concurrency))
    Console().print(table)


def print_plan(model: Path, config: Qwen3NextConfig, p: Plan, facts: Mapping[str, Any]) -> None:
    """The memory of one rank, and how many requests fit."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{model.resolve().name}: {facts['parameters'] / 1e9:.2f} B parameters"
        f" + {facts['parameters_mtp'] / 1e9:.2f} B MTP, on each of {config.tp_size} rank(s)",
        caption=f"weights from {facts['weights_from']}; activations need memory on top of this",
    )
    table.add_column("what")
    table.add_column("bytes", justify="right")
    table.add_column("", justify="right")

    def row(what: str, nbytes: int, note: str = "") -> None:
        table.add_row(what, f"{nbytes:,}", note or readable(nbytes))

    for part, nbytes in p.weights.items():
        if nbytes:
            row(f"weights: {part}", nbytes)
    row("[bold]weights[/]", sum(p.weights.values()))
    if p.flags.mapped:
        row(
            "weights in mapped files", p.flags.mapped, f"{readable(p.flags.mapped)}, paged by Linux"
        )
    if table_of := facts["ngram_table_in_files"]:
        row("n-gram table in files", table_of, f"{readable(table_of)}, paged by Linux")
    table.add_section()
    for part, nbytes in p.state_page.items():
        row(f"state page: {part}", nbytes, "one layer, one slot")
    row("[bold]state of a slot[/]", p.state_bytes_per_slot, f"{p.linear_layers} linear layers")
    row("[bold]KV of a token[/]", p.kv_bytes_per_token, "attention layers, drafter too")
    if p.scratch:
        row("attention's scratch", p.scratch, f"{p.flags.threads} threads, any context")
    table.add_section()
    for what, nbytes, note in _rows(p):
        row(what, nbytes, note)
    console = Console()
    console.print(table)
    console.print(
        f"[bold]{p.concurrency}[/] requests at once. Bound by {bound(p)}.", highlight=False
    )
    default = by_default(p)
    enough = f"{default.concurrency} requests at once"
    if not default.fits and default.longest:
        enough = f"requests of at most {default.longest:,} tokens"
    console.print(
        f"If no flag says more, a server takes {readable(default.spare)} for states and KV: "
        f"{enough}.",
        highlight=False,
    )


def _rows(p: Plan) -> Iterator[TableRow]:
    """The engine's units of memory."""
    match p:
        case Blocks():
            yield "block", p.block_bytes, f"{p.block_tokens} tokens, or one state page a layer"
            yield (
                f"[bold]request of {p.flags.max_model_len:,} tokens[/]",
                p.blocks_per_request * p.block_bytes,
                f"{p.blocks_per_request} blocks, {p.state_blocks} of them state",
            )
            yield "memory", p.flags.memory, f"{p.blocks} blocks next to the weights"
        case Pools():
            slots = f"{p.slots}, {p.slots_per_request} a request"
            yield "slots", (p.slots + 1) * p.slot_bytes, slots
            yield "tokens", p.tokens * p.kv_bytes_per_token, f"{p.tokens:,}"
            yield "memory", p.flags.memory, f"{readable(p.spare)} next to the weights"
