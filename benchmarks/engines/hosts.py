"""vLLM and SGLang, both with the plugin: steps and prefill, alternating in one run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.block_model import model_of
from benchmarks.engines.steps import check, flags
from benchmarks.report import Record, Run, console
from benchmarks.worker import SGLANG, Worker, alternate, started

PROMPT = 1024


def measure(run: Run) -> Iterator[Record]:
    """Shortest steps and fastest prefill of both."""
    model, name = model_of(run)
    rounds, steps = (2, 12) if run.quick else (5, 16)
    rows = {}
    with hosts(run, model) as engines:
        difference = check(engines.values())
        console.print(f"check: log-probabilities differ by {difference:.4f} on average")
        for batch in (1, 8):
            results = alternate(engines, rounds, "decode", batch=batch, steps=steps)
            shortest = {host: min(map(min, times)) for host, times in results.items()}
            rows[f"decode step, batch {batch}"] = with_ratio(shortest)
        results = alternate(engines, rounds, "prefill", tokens=PROMPT)
        fastest = {host: 1e3 * PROMPT / max(rates) for host, rates in results.items()}
        rows[f"prefill of {PROMPT:,} tokens"] = with_ratio(fastest)
    yield run.record(
        "engines/hosts",
        "How long do both engines take?",
        f"{name}, bf16, vLLM compiled; shortest of all rounds",
        {"vLLM": "ms", "SGLang": "ms", "SGLang / vLLM": ""},
        rows,
    )


def sglang_flags(model: Path, *, quick: bool) -> dict[str, Any]:
    """SGLang's flags, with vLLM's sizes and no prefix cache."""
    return {
        "model_path": str(model),
        "device": "cpu",
        "context_length": 4096 if quick else 20000,
        "chunked_prefill_size": 2048,
        "max_total_tokens": 40000,
        "max_running_requests": 16,
        "disable_radix_cache": True,
        "sleep_on_idle": True,  # an idle engine that polls takes a core from the other one
    }


@contextmanager
def hosts(run: Run, model: Path) -> Iterator[dict[str, Worker]]:
    """vLLM, compiled (its default), and SGLang. A quick run does not compile."""
    with ExitStack() as stack:
        eager = {"enforce_eager": True} if run.quick else {}
        vllm = Worker("vLLM", flags(model, quick=run.quick, **eager), run.out / "hosts-vllm.log")
        sglang = Worker(
            "SGLang",
            sglang_flags(model, quick=run.quick),
            run.out / "hosts-sglang.log",
            module=SGLANG,
        )
        yield {worker.name: stack.enter_context(started(worker)) for worker in (vllm, sglang)}


def with_ratio(times: dict[str, float]) -> dict[str, float]:
    return times | {"SGLang / vLLM": times["SGLang"] / times["vLLM"]}
