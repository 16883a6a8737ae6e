"""`python -m benchmarks.kernels`: the CPU kernels against the operators that upstream calls."""

from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Annotated

import torch
import typer
from rich.progress import track

from benchmarks import parts, report
from benchmarks.kernels.timing import PAIRS, QUICK_PAIRS, Case, timed
from benchmarks.report import OUT, Docs, Out, Quick, Record, Run, console
from qwen3next_plugin.engines.huge_pages import use_huge_pages
from qwen3next_plugin.kernels import native


class Name(Enum):
    DELTA_RULE = "delta-rule"
    CONVOLUTION = "convolution"
    VERIFY_LAYER = "verify-layer"
    DRAFT_HEAD = "draft-head"
    LINEAR = "linear"
    EXPERTS = "experts"
    ATTENTION = "attention"


QUESTIONS = {
    Name.DELTA_RULE: "How fast is the gated delta rule?",
    Name.CONVOLUTION: "How fast is the causal convolution?",
    Name.VERIFY_LAYER: "How fast are rule and convolution together, without AMX?",
    Name.DRAFT_HEAD: "How fast is the first-ranked token found?",
    Name.LINEAR: "How fast are packed linear layers?",
    Name.EXPERTS: "How fast are the experts?",
    Name.ATTENTION: "How fast is full attention?",
}


def cases_of(name: Name) -> Callable[[], Iterator[Case]]:
    """The cases of an op; the modules import vLLM, which --help need not wait for."""
    from benchmarks.kernels import (
        attention,
        convolution,
        delta_rule,
        draft_head,
        experts,
        linear,
        verify_layer,
    )

    return {
        Name.DELTA_RULE: delta_rule.cases,
        Name.CONVOLUTION: convolution.cases,
        Name.VERIFY_LAYER: verify_layer.cases,
        Name.DRAFT_HEAD: draft_head.cases,
        Name.LINEAR: linear.cases,
        Name.EXPERTS: experts.cases,
        Name.ATTENTION: attention.cases,
    }[name]


def measure_op(run: Run, name: Name) -> Iterator[Record]:
    """Times of an op's cases, alternating; raises RedCheckError on the first red check."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.manual_seed(0)
    pairs = QUICK_PAIRS if run.quick else PAIRS
    cases = (case for case in cases_of(name)() if case.in_quick or not run.quick)
    rows = {
        case.name: timed(case, pairs)
        for case in track(cases, f"kernels: {name.value}", console=console)
    }
    yield run.record(
        f"kernels/{name.value.replace('-', '_')}",
        QUESTIONS[name],
        f"released model's shapes, bf16, {native.isa()}, {torch.get_num_threads()} threads",
        {"upstream": "µs", "plugin": "µs", "upstream / plugin": ""},
        rows,
    )
    yield from more(run, name, pairs)


def more(run: Run, name: Name, pairs: int) -> Iterator[Record]:
    """What three ops read, and what one multiplies, besides their times."""
    from benchmarks.kernels import attention, delta_rule, linear

    if name is Name.DELTA_RULE:
        yield run.record(
            "kernels/state_bytes",
            "How much of its page does a token move?",
            "counted",
            {"S every token": "MB", "S once in 8": "MB", "once in 8 / every token": ""},
            {"decode": delta_rule.bytes_per_token()},
        )
    if name is Name.ATTENTION:
        yield run.record(
            "kernels/attention_bandwidth",
            "How fast is attention, compared with a read?",
            f"context of {attention.CONTEXT:,}, {torch.get_num_threads()} threads",
            {"keys and values": "MB", "decode": "µs", "decode / reading them": ""},
            {"decode": attention.over_bandwidth(pairs)},
        )
    if name is Name.LINEAR:
        yield run.record(
            "kernels/linear_bandwidth",
            "How fast is a packed layer, compared with a read?",
            f"M = 1, N = {linear.N:,}, K = {linear.K:,}, {torch.get_num_threads()} threads",
            {"weight": "MB", "layer": "µs", "reading it / layer": ""},
            linear.over_bandwidth(pairs),
        )
        yield run.record(
            "kernels/linear_peak",
            "How fast is a packed layer, compared with its instruction in registers?",
            f"M = 512, N = {linear.N:,}, K = {linear.K:,}, {torch.get_num_threads()} threads",
            {"instruction": "", "layer": "10⁹ multiplications/s", "layer / registers": ""},
            linear.over_peak(pairs),
        )


PARTS = {name: parts.Part(partial(measure_op, name=name)) for name in Name}


def measure(run: Run, only: Name | None = None) -> Iterator[Record]:
    """All records of this folder, or those of one op."""
    return parts.measure(run, PARTS, only)


def main(
    part: Annotated[Name | None, typer.Option(help="Measure only this op.")] = None,
    out: Out = OUT,
    quick: Quick = False,
    docs: Docs = False,
) -> None:
    """How fast are the CPU kernels, compared with the operators that upstream calls?

    Each case runs the plugin's operator and upstream's at the released model's shapes, in turn;
    the ratio is the median of the pairs' ratios, above 1 if the plugin is faster. Calls walk over
    many pages, so that neither side finds its state in the nearest cache.

    Each pair of outputs is compared before anything is timed. If one differs, the command exits
    with 1 and prints no figure. Memory is in huge pages. Run it on an idle machine.
    """
    use_huge_pages()  # for both sides, as the plugin's servers do
    run = Run(__package__, out, quick)
    report.finish(run, lambda: measure(run, part), docs=docs)


if __name__ == "__main__":
    typer.run(main)
