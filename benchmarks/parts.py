"""What can be measured: each part answers a question or a few, in a process of its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

from benchmarks.report import MEASURED, Record, Run, load_all
from benchmarks.worker import SGLANG_PYTHON


@dataclass(frozen=True, slots=True)
class Part:
    """A module of benchmarks/, whose `measure` yields records."""

    module: str
    says: str
    minutes: float  # about, on two cores, as long as no run has recorded it
    arguments: tuple[str, ...] = ()  # of `measure`, behind the run
    missing: Callable[[], str] = lambda: ""  # why this machine cannot measure it

    def measure(self, run: Run) -> Iterator[Record]:
        """Its records; the modules import engines, which others need not wait for."""
        return import_module(f"benchmarks.{self.module}").measure(run, *self.arguments)


def no_sglang() -> str:
    return "" if SGLANG_PYTHON.exists() else "needs `make setup ENGINE=sglang`"


def no_peers() -> str:
    return import_module("benchmarks.peers.decode").missing()


PARTS = {
    "delta-rule": Part("kernels.delta_rule", "the gated delta rule; vLLM's operator", 0.8),
    "convolution": Part("kernels.convolution", "the causal convolution; vLLM's", 0.4),
    "draft-head": Part("kernels.draft_head", "the head's first-ranked token; bf16", 0.5),
    "experts": Part("kernels.experts", "a layer's experts, each format; vLLM's in bf16", 2.5),
    "linear": Part("kernels.linear", "packed layers; a read, and products in registers", 0.8),
    "attention": Part("kernels.attention", "full attention; torch's, and a read", 0.6),
    "engines": Part("engines.steps", "steps, prompts and memory of vLLM, and SGLang", 6),
    "startup": Part("engines.startup", "until `vllm serve` is ready", 3),
    "family": Part("engines.family", "four layers of Qwen3.6's sizes", 9),
    "quantised": Part("engines.quantised", "the plugin in bf16, int8 and int4", 3),
    "verify": Part("mtp.steps", "steps that verify drafts, in plain steps; vLLM's own", 7),
    **{
        f"clients-{engine}-{model}": Part(
            "mtp.clients",
            f"HTTP clients of the {said}, with MTP and without",
            minutes,
            (engine, model),
            no_sglang if engine == "sglang" else lambda: "",
        )
        for engine in ("vllm", "sglang")
        for model, said, minutes in (("tiny", "shipped checkpoint", 6), ("block", "block model", 9))
    },
    "claim": Part("claim", "blocks of Qwen3-Next against those of Qwen3-32B", 10),
    "peers": Part("peers.decode", "llama.cpp, ik_llama.cpp, zentorch", 6, missing=no_peers),
}  # fmt: skip


def expected() -> dict[str, float]:
    """Minutes of each part: those of the last run, or about how many it takes."""
    recorded = {record.part: record.seconds / 60 for record in load_all(MEASURED)}
    return {name: recorded.get(name, part.minutes) for name, part in PARTS.items()}
