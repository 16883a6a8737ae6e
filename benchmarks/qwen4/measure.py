"""What is measured of Qwen3.8-Flash-Next, one engine at a time but for transformers' prompts."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engines.steps import ROUNDS, check, flags
from benchmarks.full.limits import Work, mean, rounds_of, step_bytes
from benchmarks.full.measure import LEARNING, MTP, rate, row, step
from benchmarks.qwen4.model import LAYERS, config_of, model, table_bytes
from benchmarks.qwen4.sparse import CONTEXT, sparse_over_full
from benchmarks.report import Record, RedCheckError, Run
from benchmarks.worker import VLLM, Worker, alternate, started

WATCHED, THEIRS = "benchmarks.qwen4.worker", "benchmarks.qwen4.theirs"
PROMPT, READ, STEPS = 1024, 2000, 32
CASE = "Qwen3.8-Flash-Next's shapes, a quarter of its experts, random weights"
MAX_DIFFERENCE = {"transformers": 0.02}  # mean, nats; measured: 0.003
Row = dict[str, float]


def measure(run: Run) -> Iterator[Record]:
    """Sparse attention first, which needs no engine."""
    folder = run.out / "qwen4"
    forms = {form: model(folder, form) for form in ("int4", "bf16", "large")}
    yield run.record(
        "qwen4/sparse",
        "How long does sparse attention take, compared with full attention?",
        "one layer of Qwen3.8-Flash-Next's shapes, with its indexer, bf16",
        {"full": "µs", "sparse": "µs", "sparse / full": ""},
        {f"decode at {CONTEXT:,}": sparse_over_full()},
    )
    yield from steps(run, forms["int4"])
    with watched(run, forms["large"], "int4") as engine:
        yield table(run, engine)
        shares = {f"int4, {LAYERS['large']} layers": share(engine)}
    with watched(run, forms["bf16"], "bf16") as engine:
        shares[f"bf16, {LAYERS['bf16']} layers"] = share(engine)
        yield run.record(
            "qwen4/shares",
            "How much of a decode step are hyper-connections and n-grams?",
            f"{CASE}, eager",
            {"step": "ms", "hyper-connections": "ms", "n-grams": "ms", "both / step": ""},
            shares,
        )
        yield prompts(run, engine, forms["bf16"])


def case_of(form: str) -> str:
    """What is measured in a form."""
    return f"{LAYERS[form]} layers of {CASE}, {'bf16' if form == 'bf16' else 'int4'}"


def steps(run: Run, folder: Path) -> Iterator[Record]:
    """A plain step against what it must read, and drafts against plain steps, in turn."""
    config, case = config_of("int4"), f"{case_of('int4')}, eager"
    eager = {"enforce_eager": True}
    drafting = eager | {"speculative_config": MTP}
    with (
        engine_of(run, folder, "plain", **eager) as plain,
        engine_of(run, folder, "drafts", **drafting) as drafts,
    ):
        rate(drafts, config, 1, LEARNING)
        work = Work(step_bytes(config, "int4", 1), 0)
        near = rounds_of(work, partial(step, plain, config, 1), ROUNDS)
        found = {"plain": 0.0, "drafts": 0.0}
        for _ in range(ROUNDS):
            for engine in (plain, drafts):
                found[engine.name] = max(found[engine.name], rate(engine, config, 1, 1))
    yield run.record(
        "qwen4/steps",
        "How near is a step to this machine's limit?",
        case,
        {"time": "ms", "tokens a second": "", "limit": "ms", "limit / time": ""},
        {"decode, batch 1": row(mean(near), 1)},
    )
    yield run.record(
        "qwen4/drafts",
        "What do drafts give, four in five of them right?",
        case,
        {"plain": "tokens a second", "drafts": "tokens a second", "drafts / plain": ""},
        {"1 request": found | {"drafts / plain": found["drafts"] / found["plain"]}},
    )


def engine_of(
    run: Run, folder: Path, side: str, module: str = VLLM, **more: Any
) -> AbstractContextManager[Worker]:
    log = run.out / f"qwen4-{side}.log"
    return started(Worker(side, flags(folder, **more), log, module=module))


def watched(run: Run, folder: Path, side: str) -> AbstractContextManager[Worker]:
    return engine_of(run, folder, side, WATCHED)


def table(run: Run, engine: Worker) -> Record:
    """Resident memory before and after random prompts, whose n-grams are all different."""
    engine.call("read", tokens=READ, random=False)  # what activations take is there before
    before = engine.call("resident")
    for _ in range(5):
        engine.call("read", tokens=READ, random=True)
    grown, size = engine.call("resident") - before, table_bytes("large")
    if not grown > 0:
        raise RedCheckError("reading rows of the table took no memory: it was not read")
    return run.record(
        "qwen4/table",
        "How much of a table of n-grams is in memory?",
        f"{case_of('large')}; {5 * READ:,} random tokens, a table of holes, zeros once read",
        {"table": "GB", "before": "GB", "read": "GB", "read / table": ""},
        {
            "resident memory": {
                "table": size / 1e9,
                "before": before / 1e9,
                "read": grown / 1e9,
                "read / table": grown / size,
            }
        },
    )


def share(engine: Worker) -> Row:
    """Times of the shortest decode step of one request."""
    found: Row = engine.call("shares", steps=STEPS)
    both = found["hyper-connections"] + found["n-grams"]
    return found | {"both / step": both / found["step"]}


def prompts(run: Run, plugin: Worker, folder: Path) -> Record:
    """A prompt in the plugin and in transformers, whose log-probabilities must be alike."""
    log = run.out / "qwen4-transformers.log"
    theirs = Worker("transformers", {"model": str(folder)}, log, module=THEIRS)
    with started(theirs):
        engines = {"transformers": theirs, "plugin": plugin}
        check(engines, MAX_DIFFERENCE)
        found = alternate(engines, 2, "prefill", tokens=PROMPT)
    times = {side: min(each) for side, each in found.items()}
    ratio = times["transformers"] / times["plugin"]
    return run.record(
        "qwen4/prompts",
        "How long does a prompt take, compared with transformers?",
        f"{case_of('bf16')}, eager",
        {"transformers": "ms", "plugin": "ms", "transformers / plugin": ""},
        {f"prompt of {PROMPT:,} tokens": times | {"transformers / plugin": ratio}},
    )
