"""`python -m benchmarks.full`: a released size with all its layers, from start to drafts.

Four layers hide what a user of forty meets: the start, packing, what happens between kernels. It
needs a quiet machine, 24 GB of memory and 40 GB of disk for Qwen3.6-35B-A3B in 4 bits.
"""

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from random import Random
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress

from benchmarks.block_model import OWN, tensors
from benchmarks.chain_model import answer_of, known
from benchmarks.engines.steps import ROUNDS, STEPS, flags
from benchmarks.full_model import KINDS, QUANTISED, full_config, full_model
from benchmarks.kernels import linear
from benchmarks.kernels.timing import seconds
from benchmarks.origin import origin
from benchmarks.report import Record, RedCheckError, Rows, Run, console, shown
from benchmarks.worker import Worker, started
from qwen3next_plugin.engines.vllm.cpu.cores import binding
from qwen3next_plugin.kernels.linear import linear as multiply
from qwen3next_plugin.model.quantisation.writing import plan_packing, write_packed

BATCHES, PROMPTS, ANSWER = (1, 4, 8), (1024, 8192), 64
GROUP = 128  # columns of a scale
# Bits of a quantised weight, its scales included; zero points where the tool always writes them.
BITS = {"int4": 4 + 16 / GROUP, "int8": 8, "fp8": 8 + 32 / GROUP, "nvfp4": 4.5, "bf16": 16}
BITS |= dict.fromkeys(("gptq", "awq"), BITS["int4"] + 8 / GROUP)
EMBEDDING, HEAD, _ = OWN
LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")
MTP = {"method": "qwen3_next_mtp", "num_speculative_tokens": 3}


def step_bytes(config: Mapping[str, Any], kind: str, batch: int) -> float:
    """What a plain step of so many requests reads, if every token chooses its experts at random."""
    return sum(
        math.prod(shape) * _share(name, config, batch) * _bits(name, kind) / 8
        for name, shape in tensors(config).items()
        if name != EMBEDDING and not name.startswith("mtp.")
    )


def products(config: Mapping[str, Any]) -> float:
    """Multiplications of a prompt's token in its weights; attention and states not counted."""
    return sum(
        math.prod(shape) * (_active(config) if ".experts." in name else 1)
        for name, shape in tensors(config).items()
        if len(shape) == 2 and name not in OWN and not name.startswith("mtp.")
    )


def _active(config: Mapping[str, Any]) -> float:
    """The share of a layer's experts that a token chooses."""
    return config["num_experts_per_tok"] / config["num_experts"]


def _share(name: str, config: Mapping[str, Any], tokens: int) -> float:
    return 1 - (1 - _active(config)) ** tokens if ".experts." in name else 1


def _bits(name: str, kind: str) -> float:
    """Bits of a weight as it is served."""
    if kind != "bf16" and name == HEAD:
        return 8
    return BITS[kind] if QUANTISED.match(name) else 16


def read_rate() -> float:
    """Bytes a second of a sum over 512 MB by all threads."""
    large = torch.ones(2**26, dtype=torch.int64)
    seconds(large.sum, 1)
    return large.nbytes / min(seconds(large.sum, 1) for _ in range(ROUNDS))


def product_rate() -> float:
    """Multiplications a second of a layer in bf16, of 1,024 rows."""
    weight, _ = linear.bf16()
    call = partial(multiply, torch.randn(1024, linear.K).bfloat16(), weight)
    seconds(call, 1)
    return 1024 * linear.N * linear.K / min(seconds(call, 1) for _ in range(ROUNDS))


def prompts(config: Mapping[str, Any], count: int) -> list[list[int]]:
    """Prompts that end with a known token, whose answer follows from it."""
    random = Random(0)
    return [[random.randrange(2, known(config)) for _ in range(32)] for _ in range(count)]


def measure(run: Run, size: str, kind: str, layers: int | None) -> Iterator[Record]:
    """One engine at a time: the model may take most of the memory."""
    folder = run.out / "-".join(map(str, ("full", size, kind, layers or "all")))
    model, config = full_model(folder, size, kind, layers), full_config(size, kind, layers)
    case = f"{size} in {kind}, {config['num_hidden_layers']} layers, random weights, vLLM, eager"
    answers: dict[str, dict[int, float]] = {}
    rows: dict[str, dict[str, float]] = {}
    starts: dict[str, dict[str, float]] = {}
    with ready(run, "plain", model, starts) as engine:
        rows = steps(engine, config, kind)
        answers["plain"] = {batch: rate(engine, config, batch) for batch in BATCHES}
    units = {"time": "ms", "tokens a second": "", "limit": "ms", "limit / time": ""}
    question = "How near is a step to this machine's limits?"
    yield run.record("full/steps", question, case, units, rows)
    with ready(run, "drafts", model, starts, speculative_config=MTP) as engine:
        answers["drafts"] = {batch: rate(engine, config, batch) for batch in BATCHES}
    if kind != "bf16":
        packed = pack(model)
        for side, mapped in (("packed", "0"), ("packed, mapped", "1")):
            with ready(run, side, packed, starts, env={"QWEN3NEXT_MMAP": mapped}):
                pass
    yield run.record(
        "full/start", "How long until a model is ready?", case,
        {"until ready": "s", "loading": "s", "peak, GB": ""}, starts,
    )  # fmt: skip
    yield run.record(
        "full/drafts",
        "What do drafts give, four in five of them right?",
        case,
        {"plain": "tokens a second", "drafts": "tokens a second", "drafts / plain": ""},
        ratios(answers),
    )


@contextmanager
def ready(
    run: Run,
    side: str,
    model: Path,
    starts: dict[str, dict[str, float]],
    env: Mapping[str, str] | None = None,
    **more: Any,
) -> Iterator[Worker]:
    """A started engine; adds its start to `starts`."""
    log = run.out / f"full-{side.replace(', ', '-')}.log"
    asked = flags(model, max_model_len=10000, enforce_eager=True, **more)
    begin = time.perf_counter()
    with started(Worker(side, asked, log, env=env)) as engine:
        starts[side] = {"until ready": time.perf_counter() - begin, **loading(log)}
        starts[side]["peak, GB"] = engine.call("peak_memory")
        console.print(f"{side}: ready after {starts[side]['until ready']:.0f} s")
        yield engine


def pack(model: Path) -> Path:
    """The model as `qwen3next pack` writes it, beside it; once."""
    out = model.with_name(f"{model.name}-packed")
    if not out.exists():
        plan = plan_packing(model, None, torch.bfloat16)
        with Progress(*Progress.get_default_columns(), console=console) as progress:
            task = progress.add_task("packing", total=plan.nbytes)
            write_packed(plan, out, lambda count: progress.advance(task, count))
    return out


def rate(engine: Worker, config: Mapping[str, Any], batch: int) -> float:
    """Tokens a second of the best of a few rounds; raises if an answer is not the known one."""
    asked = prompts(config, batch)
    wanted = [[int(word) for word in answer_of(config, prompt, ANSWER)] for prompt in asked]
    rates = []
    for _ in range(ROUNDS):
        found, answers = engine.call("answer", prompts=asked, tokens=ANSWER)
        if answers != wanted:
            raise RedCheckError(f"{engine.name}: an answer of {batch} requests is wrong")
        rates.append(found)
    return max(rates)


def loading(log: Path) -> dict[str, float]:
    """Seconds of reading and packing, as the engine logs them."""
    found = LOADING.search(log.read_text())
    return {"loading": float(found[1])} if found else {}


def steps(engine: Worker, config: Mapping[str, Any], kind: str) -> Rows:
    """Shortest steps and prompts; each limit is measured right before and after, too."""
    found = {}
    for batch in BATCHES:
        rate = read_rate()
        times = [min(engine.call("decode", batch=batch, steps=STEPS)) for _ in range(ROUNDS)]
        limit = 1e3 * step_bytes(config, kind, batch) / max(rate, read_rate())
        found[f"decode, batch {batch}"] = row(min(times), batch, limit)
    for tokens in PROMPTS:
        rate = product_rate()
        milliseconds = min(engine.call("prefill", tokens=tokens) for _ in range(2))
        limit = 1e3 * tokens * products(config) / max(rate, product_rate())
        found[f"prompt of {tokens:,}"] = row(milliseconds, tokens, limit)
    return found


def row(milliseconds: float, tokens: int, limit: float) -> dict[str, float]:
    """A step of so many tokens, in ms, and the least it could take."""
    return {
        "time": milliseconds,
        "tokens a second": 1e3 * tokens / milliseconds,
        "limit": limit,
        "limit / time": limit / milliseconds,
    }


def ratios(answers: Mapping[str, Mapping[int, float]]) -> Rows:
    """Tokens a second of both, by the number of requests."""
    plain, drafts = answers["plain"], answers["drafts"]
    return {
        f"{n} request{'s'[: n > 1]}": {
            "plain": plain[n], "drafts": drafts[n], "drafts / plain": drafts[n] / plain[n],
        }
        for n in plain
    }  # fmt: skip


def main(
    size: Annotated[str, typer.Option(help="A folder of examples/configs.")] = "Qwen3.6-35B-A3B",
    kind: Annotated[str, typer.Option(help=f"Stored weights: {', '.join(KINDS)}.")] = "int4",
    layers: Annotated[int | None, typer.Option(help="Only the first of them.")] = None,
    out: Annotated[Path, typer.Option(help="For model, logs and records.")] = Path("out"),
) -> None:
    """Measure a released size with random weights: start, memory, steps, prompts, drafts.

    Steps are compared with the bytes that they must read, prompts with the products of one large
    layer in bf16, both at rates of the same minute.
    """
    if kind not in KINDS:
        raise typer.BadParameter(f"no kind {kind}: one of {', '.join(KINDS)}")
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, "full", origin(datetime.now(UTC).isoformat("T", "seconds")))
    for record in shown(measure(run, size, kind, layers)):
        record.save(out / "parts")
    console.print(f"kept in {out / 'parts' / 'full'}")


if __name__ == "__main__":
    for name, value in binding(ranks=1).items():
        os.environ.setdefault(name, value)
    typer.run(main)
