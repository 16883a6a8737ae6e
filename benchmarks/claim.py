"""Is Qwen3-Next ten times as fast as Qwen3-32B, as published? On one engine and machine.

One block of each model's released shapes runs in vLLM: a layer of Qwen3-32B; a linear and an
attention layer of Qwen3-Next, with 512 experts or as many as memory has room for. Layers are timed,
and times scaled to 64 and to 36 + 12 layers, with embedding, head and sampling once. Both are
compared with transformers, and a layer must take as long in one block as in two.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import claim_models
from benchmarks.claim_models import BLOCK, DENSE, LAYERS, NEXT
from benchmarks.engines.steps import mean_difference
from benchmarks.report import Record, RedCheckError, Run, console
from benchmarks.worker import PROMPTS, VLLM_LAYERS, Worker, prompts, started

Times = Mapping[str, float]  # milliseconds: of a layer of each kind, and of the `rest` of a step

MODELS = (DENSE, NEXT)
CHUNK = 2048  # tokens of a prompt that are read in a step
LENGTHS = (4096, 32768, 131072)
LAST = len(LENGTHS) - 1  # of that length only the last chunk is read
ROUNDS, MOST_ROUNDS, STEPS, BATCH = 3, 12, 16, 8
# "Qwen3-Next: Towards Ultimate Training & Inference Efficiency", 2025: throughput at a context of
# 4,096, and beyond 32,768.
PUBLISHED = {"prefill": {4096: "7", 32768: "over 10"}, "decode": {4096: "4", 32768: "over 10"}}

# Mean, nats, from transformers in bf16. With ten of 512 random experts near ties decide which.
MAX_DIFFERENCE = 0.2
# Of a layer's time in two blocks from that in one. In decode, caches help one block more.
MAX_DEPTH_ERROR = 0.4


class Context(NamedTuple):
    """The times of steps."""

    read: list[Times]  # of those that read a prompt
    decoded: list[Times]  # of decode steps after it


def measure(run: Run) -> Iterator[Record]:
    """Both models scaled, and their layers."""
    experts = claim_models.experts_with_room()
    sides = {model: timed(run, model, {"num_experts": experts}) for model in MODELS}
    case = f"blocks in vLLM, {experts} experts, random weights, bf16, eager"
    yield run.record(
        "claim/factors",
        "How fast?",
        f"{case}; scaled to {describe()} layers",
        dict.fromkeys(MODELS, "tok/s") | {"times": "", "published": ""},
        speeds(sides),
    )
    yield run.record(
        "claim/layers",
        "How long does a layer take?",
        case,
        {
            f"{what} at {length:,}": "ms"
            for what in (f"{CHUNK:,} tokens", "decode")
            for length in (LENGTHS[0], LENGTHS[LAST])
        },
        {name: cells for side in sides.values() for name, cells in side.layers().items()},
    )


def timed(run: Run, model: str, changes: Mapping[str, int]) -> "Side":
    """One model, checked and then timed; alone in memory, of which it takes most."""
    expected = reference(claim_models.written(run, model, 1, changes))
    with start(run, model, claim_models.written(run, model, 2, changes)) as engine:
        use(engine, model, 1)
        difference = mean_difference(engine.logprobs(), expected, MAX_DIFFERENCE)
        console.print(f"check: {model} differs from transformers by {difference:.4f}")
        found = [at_depths(model, engine)]
        use(engine, model, 1)
        for i, length in enumerate(LENGTHS[1:], start=1):
            skipped = length // CHUNK - 1 if i == LAST else 0
            with console.status(f"{model}: {length:,} tokens"):
                found.append(context(engine, length, skipped))
        batch = context(engine, LENGTHS[0], 10**6, BATCH)
    return Side(model, found, batch)


def use(engine: Worker, model: str, blocks: int) -> None:
    """Let only so many blocks compute."""
    engine.call("use", layers=blocks * len(BLOCK[model]))


def reference(folder: Path) -> list[float]:
    """What transformers computes in bf16 for the prompts that all workers share."""
    from transformers import AutoModelForCausalLM

    with console.status(f"transformers: {folder.name}"), torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        found = []
        for prompt in prompts(PROMPTS, model.config.vocab_size):
            ids = torch.tensor([prompt])
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)  # [T - 1, vocab]
            found += logprobs.gather(-1, ids[0, 1:, None])[:, 0].tolist()
    return found


def start(run: Run, model: str, folder: Path) -> AbstractContextManager[Worker]:
    """An engine with room for the longest context, in a context."""
    flags = {
        "model": str(folder),
        "max_model_len": LENGTHS[LAST] + 64,
        "max_num_batched_tokens": CHUNK,
        "max_num_seqs": BATCH,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 9 << 27,
        "enforce_eager": True,
    }
    log = run.out / f"claim-{folder.name}.log"
    return started(Worker(model, flags, log, module=VLLM_LAYERS))


def context(engine: Worker, tokens: int, skipped: int, batch: int = 1) -> Context:
    """Steps that read, and decode steps; see `layer_worker`."""
    found = engine.call("context", tokens=tokens, skipped=skipped, steps=STEPS, batch=batch)
    return Context(*found)


def scaled(model: str, times: Times) -> float:
    """Milliseconds of a step of the released model."""
    return sum(n * times[kind] for kind, n in LAYERS[model].items()) + times["rest"]


def at_depths(model: str, engine: Worker) -> Context:
    """The shortest times of one block; raises if layers of two blocks take another time.

    A layer's time may be scaled only if it does not depend on the layers around it. Where other
    work disturbs, more rounds come nearer to the shortest times of both.
    """
    rounds: dict[int, list[Context]] = {1: [], 2: []}
    for i in range(1, MOST_ROUNDS + 1):
        with console.status(f"{model}: one block and two in turn, round {i}"):
            for blocks, found in rounds.items():
                use(engine, model, blocks)
                found.append(context(engine, LENGTHS[0], 0))
        checks = list(depth_checks(model, rounds))
        if i >= ROUNDS and all(near for _, near in checks):
            break
    for said, near in checks:
        console.print(f"check: {said}")
        if not near:
            raise RedCheckError(said)
    return joined(rounds[1])


def depth_checks(model: str, rounds: Mapping[int, list[Context]]) -> Iterator[tuple[str, bool]]:
    """For each kind of layer, its times in one block and in two, and whether they are near."""
    one, two = map(joined, rounds.values())
    for what, first, both in zip(("read", "decode"), one, two, strict=True):
        for kind in BLOCK[model]:
            alone, beside = (sum(times[kind] for times in steps) for steps in (first, both))
            said = f"{model}, {what}: {kind} takes {alone:.2f} ms in one block, {beside:.2f} in two"
            yield said, abs(beside / alone - 1) <= MAX_DEPTH_ERROR


def joined(rounds: Sequence[Context]) -> Context:
    """The shortest times of all rounds: of each chunk, and of the decode steps."""
    chunks = [shortest(same) for same in zip(*(each.read for each in rounds), strict=True)]
    decoded = shortest([times for each in rounds for times in each.decoded])
    return Context(chunks, [decoded])


def shortest(steps: Sequence[Times]) -> Times:
    """Of steps that do the same the shortest time of each part, because other work only adds."""
    return {part: min(times[part] for times in steps) for part in steps[0]}


class Side:
    """What was measured of one model."""

    def __init__(self, model: str, found: list[Context], batch: Context) -> None:
        self.model = model
        self.chunks = [each.read for each in found]
        self.steps = [shortest(each.decoded) for each in found]
        self.batch = shortest(batch.decoded)

    def prefill(self, i: int) -> float:
        """Tokens per second of a prompt; beyond those read whole, chunks grow in even steps."""
        whole = LAST - 1 if i == LAST else i  # a length that is read whole
        chunks = [scaled(self.model, times) for times in self.chunks[whole]]
        if i == LAST:
            last = scaled(self.model, self.chunks[LAST][-1])
            n = LENGTHS[LAST] // CHUNK - len(chunks)
            grows = (last - chunks[-1]) / n
            chunks += [chunks[-1] + grows * (j + 1) for j in range(n)]
        return 1e3 * LENGTHS[i] / sum(chunks)

    def decode(self, i: int) -> float:
        """Tokens per second of one request behind a context."""
        return 1e3 / scaled(self.model, self.steps[i])

    def batched(self) -> float:
        """Tokens per second of BATCH requests behind the shortest context."""
        return 1e3 * BATCH / scaled(self.model, self.batch)

    def layers(self) -> dict[str, dict[str, float]]:
        """Milliseconds of the parts, at the shortest and the longest context."""
        columns = {
            f"{what} at {LENGTHS[i]:,}": times[i]
            for what, times in (
                (f"{CHUNK:,} tokens", [chunks[-1] for chunks in self.chunks]),
                ("decode", self.steps),
            )
            for i in (0, LAST)
        }
        kinds = {kind: f"{kind.replace('_', ' ')} layer" for kind in BLOCK[self.model]}
        kinds["rest"] = "all but layers"
        return {
            f"{self.model}: {name}": {column: times[kind] for column, times in columns.items()}
            for kind, name in kinds.items()
        }


def speeds(sides: Mapping[str, Side]) -> dict[str, dict[str, float | str]]:
    """Both models and how many times as fast, beside what is published."""
    rows: dict[str, dict[str, float | str]] = {}

    def add(name: str, rates: dict[str, float], published: str = "") -> None:
        times = rates[NEXT] / rates[DENSE]
        rows[name] = {**rates, "times": times, "published": published}

    for what, published in PUBLISHED.items():
        for i, length in enumerate(LENGTHS):
            rates = {model: getattr(side, what)(i) for model, side in sides.items()}
            add(f"{what}, {length:,}", rates, published.get(length, ""))
    rates = {model: side.batched() for model, side in sides.items()}
    add(f"decode, {LENGTHS[0]:,}, batch {BATCH}", rates)
    return rows


def counted() -> dict[str, dict[str, float]]:
    """Parameters of the released models, and those that a token uses."""
    rows = {}
    for model in MODELS:
        every, used = claim_models.parameters(model), claim_models.active(model)
        layers = [sum(n for name, n in c.items() if ".layers." in name) for c in (used, every)]
        total, active = sum(every.values()), sum(used.values())
        rows[model] = {
            "parameters": total / 1e9,
            "used": active / 1e9,
            "share": 100 * active / total,
            "share in the layers": 100 * layers[0] / layers[1],
        }
    return rows


def describe() -> str:
    """The numbers of layers that times are scaled to."""
    return " and ".join(str(sum(LAYERS[model].values())) for model in MODELS)
