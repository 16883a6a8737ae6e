"""What is measured of a released size, one engine at a time: it may take most of the memory.

The plugin and other engines take turns, twice: a process may get slower memory than the next.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.chain_model import answer_of, known
from benchmarks.engines.steps import flags
from benchmarks.full.limits import Round, mean, prompt_work, rounds_of, step_work
from benchmarks.full.model import full_config, full_model
from benchmarks.peers.decode import THEIRS, llama_worker, versions, with_ratios
from benchmarks.peers.gguf_model import gguf_model
from benchmarks.report import AS_RELEASED, MAPPED, Record, RedCheckError, Run, console
from benchmarks.worker import Worker, started

BATCHES, PROMPTS, ANSWER = (1, 4, 8), (1024, 8192), 64
TURNS, PER_TURN = 2, 2  # of the engines, and rounds in each
LEARNING = 8  # answers after which the lengths of drafts have adapted
LOADING = re.compile(r"Loading weights took ([\d.]+) seconds")
MTP = {"method": "mtp", "num_speculative_tokens": 3}
Start = Callable[[], AbstractContextManager[Worker]]
Row = dict[str, float]
Times = dict[str, float]  # what was timed → milliseconds
Rounds = dict[str, list[Round]]


def measure(run: Run, size: str, kind: str, layers: int | None) -> Iterator[Record]:
    """Starts, eager; then steps and answers, compiled, of a packed copy where there is one."""
    folder = run.out / "-".join(map(str, ("full", size, kind, layers or "all")))
    model, config = full_model(folder, size, kind, layers), full_config(size, kind, layers)
    packed = model if kind == "bf16" else pack(model)
    case = f"{size} in {kind}, {config['num_hidden_layers']} layers, random weights"
    yield run.record(
        "full/start",
        "How long until a model is ready whose files were read before?",
        f"{case}, eager",
        {"until ready": "s", "loading": "s", "peak, GB": ""},
        starts_of(run, model, packed),
    )

    others, compiled = peers(run, model, kind), f"{case}, compiled"
    work = {decode(n): step_work(config, kind, n) for n in BATCHES}
    work |= {prompt(n): prompt_work(config, n) for n in PROMPTS}
    engines: dict[str, tuple[Start, Sequence[int], Sequence[int]]] = {
        "plugin": (partial(ready, run, "plain", packed), BATCHES, PROMPTS),
        "drafts": (partial(ready, run, "drafts", packed, speculative_config=MTP), BATCHES, ()),
        **{name: (start, (1, 8), PROMPTS[:1]) for name, start in others.items()},
    }
    found: dict[str, Rounds] = {name: defaultdict(list) for name in engines}
    for _ in range(TURNS):
        for name, (start, batches, lengths) in engines.items():
            with start() as engine:
                rate(engine, config, 1, LEARNING if name == "drafts" else 1)
                for what, timed in tasks(engine, config, batches, lengths).items():
                    new = rounds_of(work[what], timed, PER_TURN)
                    found[name][what] += new
                    console.print(f"{name}, {what}: {', '.join(map(described, new))}")
    tokens = {decode(n): n for n in BATCHES} | {prompt(n): n for n in PROMPTS}
    units = {"time": "ms", "tokens a second": "", "limit": "ms", "limit / time": ""}
    yield run.record(
        "full/steps",
        "How near is a step to this machine's limits?",
        compiled,
        units,
        {what: row(mean(rounds), tokens[what]) for what, rounds in found["plugin"].items()},
    )
    shortest = {
        name: {what: min(each.time for each in every) for what, every in rounds.items()}
        for name, rounds in found.items()
    }
    if others:
        yield compared(run, compiled, {name: shortest[name] for name in ("plugin", *others)})

    plain, drafts = (
        {n: 1e3 * n / shortest[name][decode(n)] for n in BATCHES} for name in ("plugin", "drafts")
    )
    yield run.record(
        "full/drafts",
        "What do drafts give, four in five of them right?",
        compiled,
        {"plain": "tokens a second", "drafts": "tokens a second", "drafts / plain": ""},
        {
            f"{n} request{'s'[: n > 1]}": {
                "plain": plain[n], "drafts": drafts[n], "drafts / plain": drafts[n] / plain[n],
            }
            for n in BATCHES
        },
    )  # fmt: skip


def starts_of(run: Run, model: Path, packed: Path) -> dict[str, Row]:
    """Seconds until an engine is ready, and its peak memory, by what it loads and how.

    The page cache has as much of the files as fits beside what is loaded.
    """
    sides = {AS_RELEASED: (model, "0")}
    if packed != model:
        sides |= {"packed": (packed, "0"), MAPPED: (packed, "1")}
    found = {}
    for side, (path, mapped) in sides.items():
        read_files(path)
        begin = time.perf_counter()
        env = {"QWEN3NEXT_MMAP": mapped}
        with ready(run, side, path, env=env, enforce_eager=True) as engine:
            found[side] = {"until ready": time.perf_counter() - begin}
            found[side] |= loading(Path(engine.log.name))
            found[side]["peak, GB"] = engine.call("peak_memory")
    return found


def read_files(model: Path) -> None:
    """Let the page cache have a model's weights."""
    buffer = bytearray(1 << 24)
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


@contextmanager
def ready(
    run: Run, side: str, model: Path, env: Mapping[str, str] | None = None, **more: Any
) -> Iterator[Worker]:
    """A started engine with the plugin."""
    log = run.out / f"full-{side.replace(', ', '-').replace(' ', '-')}.log"
    begin = time.perf_counter()
    asked = flags(model, max_model_len=10000, kv_cache_memory_bytes=1 << 30, **more)
    with started(Worker(side, asked, log, env=env)) as engine:
        console.print(f"{side}: ready after {time.perf_counter() - begin:.0f} s")
        yield engine


def pack(model: Path) -> Path:
    """The model as `qwen3next pack` writes it, beside it; once."""
    from qwen3next_plugin.extras.pack.writing import plan_packing, write_packed

    out = model.with_name(f"{model.name}-packed")
    if not out.exists():
        plan = plan_packing(model, None, torch.bfloat16)
        with Progress(*Progress.get_default_columns(), console=console) as progress:
            task = progress.add_task("packing", total=plan.nbytes)
            write_packed(plan, out, lambda count: progress.advance(task, count))
    return out


def loading(log: Path) -> dict[str, float]:
    """Seconds of reading and packing, as the engine logs them."""
    found = LOADING.search(log.read_text())
    return {"loading": float(found[1])} if found else {}


def peers(run: Run, model: Path, kind: str) -> dict[str, Start]:
    """Other engines that are built and read GGUF files, with the same weights."""
    built = [name for name in ("llama.cpp", "ik_llama.cpp") if not THEIRS[name].missing]
    if kind != "int4" or not built:
        return {}
    file = gguf_model(model, model.with_name(f"{model.name}.gguf"), "Q4_0")

    def start(name: str) -> AbstractContextManager[Worker]:
        return started(llama_worker(name, file, model, run.out / f"full-{name}.log"))

    return {name: partial(start, name) for name in built}


def tasks(
    engine: Worker, config: Mapping[str, Any], batches: Sequence[int], prompts: Sequence[int]
) -> dict[str, Callable[[], float]]:
    """What takes an engine how many milliseconds: steps of answers, and prompts.

    The answers differ: those to random prompts soon repeat one token, and share its experts.
    """
    found = {decode(n): partial(step, engine, config, n) for n in batches}
    return found | {prompt(n): partial(engine.call, "prefill", tokens=n) for n in prompts}


def decode(batch: int) -> str:
    """The name of a row."""
    return f"decode, batch {batch}"


def prompt(tokens: int) -> str:
    """The name of a row."""
    return f"prompt of {tokens:,}"


def row(found: Round, tokens: int) -> Row:
    """A step of so many tokens."""
    return {
        "time": found.time,
        "tokens a second": 1e3 * tokens / found.time,
        "limit": found.limit,
        "limit / time": found.limit / found.time,
    }


def described(found: Round) -> str:
    """A round, for the console."""
    return f"{found.time:.1f} ms ({found.limit / found.time:.2f} of its limit)"


def compared(run: Run, case: str, times: Mapping[str, Times]) -> Record:
    """The plugin and other engines side by side, where all were timed."""
    theirs = [name for name in times if name != "plugin"]
    return run.record(
        "full/peers",
        "How long do other engines take, with the same weights?",
        f"{case}; {versions({name: THEIRS[name] for name in theirs})}",
        dict.fromkeys(times, "ms") | {f"{name} / plugin": "" for name in theirs},
        {
            what: with_ratios({name: found[what] for name, found in times.items()})
            for what in times[theirs[0]]
        },
    )


def prompts(config: Mapping[str, Any], count: int) -> list[list[int]]:
    """Prompts that end with a known token, whose answer follows from it."""
    random = Random(0)
    return [[random.randrange(2, known(config)) for _ in range(32)] for _ in range(count)]


def step(engine: Worker, config: Mapping[str, Any], batch: int) -> float:
    """Milliseconds of a step, as the mean of an answer's."""
    return 1e3 * batch / rate(engine, config, batch, 1)


def rate(engine: Worker, config: Mapping[str, Any], batch: int, rounds: int) -> float:
    """Tokens a second of the best of a few rounds; raises if an answer is not the known one."""
    asked = prompts(config, batch)
    wanted = [[int(word) for word in answer_of(config, prompt, ANSWER)] for prompt in asked]
    rates = []
    for _ in range(rounds):
        found, answers = engine.call("answer", prompts=asked, tokens=ANSWER)
        if answers != wanted:
            raise RedCheckError(f"{engine.name}: an answer of {batch} requests is wrong")
        rates.append(found)
    return max(rates)
