"""Clients of a server with MTP and of one without, in either engine, in turn."""

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.chain_model import answer_of
from benchmarks.mtp.cases import CASES, Case, Model, Name, load_model
from benchmarks.mtp.load import Answer, Load
from benchmarks.report import ROUNDS, Record, RedCheckError, Run, console, text
from benchmarks.server import Server, SGLangServer

OFF, MTP = "off", "MTP"
TURNS = 3  # rounds; in each, every number of clients has a turn at either server
CHECKED = 16  # answers of the shipped checkpoint
TIED = 0.125  # log-probabilities that bf16 may swap: one step of a logit between 16 and 32
ACCEPTED = {Model.CHAIN: 0.8, Model.REJECTED: 0.0}  # share of drafts, checked
WITHIN, DEVIATIONS = 0.05, 3.5  # how far it may be from that: so far, or by chance
SEEN = 50  # fewer drafts at a position say nothing
PROMPTS = 2  # read in a turn, for the time to the first token
VLLM_DRAFTS, SGLANG_DRAFTS = 4, 3
BUSY_WAIT = 1.5  # seconds; vLLM's processes wait for the next request without sleep for 1 of them
Drafts = dict[str, tuple[float, float]]  # position → drafts verified, drafts accepted
Rounds = dict[str, list[float]]  # server → what each round measured


class Engine(Enum):
    VLLM = "vllm"
    SGLANG = "sglang"

    @property
    def title(self) -> str:
        return {Engine.VLLM: "vLLM", Engine.SGLANG: "SGLang"}[self]


def measure(run: Run, engine: str, model: str) -> Iterator[Record]:
    """All cases of the shipped checkpoint (`tiny`), or of the block model."""
    is_tiny = model == "tiny"
    names = [name for name, case in CASES.items() if (case.model is Model.TINY) == is_tiny]
    seconds = sum(2 * (1 + TURNS) * sum(CASES[name].clients.values()) for name in names)
    console.print(f"clients: turns of {seconds:.0f} s in all, at least")
    for kind, group in itertools.groupby(names, key=lambda name: CASES[name].model):
        yield from of_model(run, Engine(engine), kind, list(group))


def of_model(run: Run, engine: Engine, model: Model, names: list[Name]) -> Iterator[Record]:
    """All cases of one model, with the same two servers."""
    folder, config = load_model(run, model)
    with running(run, engine, folder) as servers:
        if model is Model.TINY:
            compare_answers(servers, config)
        for name in names:
            of = Pair(run, engine, name, config, servers)
            yield of.first_tokens() if name is Name.FIRST_TOKEN else of.rates()


@contextmanager
def running(run: Run, engine: Engine, model: Path) -> Iterator[dict[str, Load]]:
    """A ready server without MTP and one with it; the idle one sleeps."""
    make = {Engine.VLLM: vllm, Engine.SGLANG: sglang}[engine]
    with ExitStack() as stack:
        servers = {}
        for side in (OFF, MTP):
            log = run.out / f"clients-{engine.value}-{side.lower()}.log"
            servers[side] = stack.enter_context(make(model, log, drafts=side == MTP))
        with console.status(f"starting {engine.title} twice: {model}"):
            for server in servers.values():
                server.wait()
        yield {side: Load(server) for side, server in servers.items()}


def vllm(model: Path, log: Path, *, drafts: bool) -> Server:
    speculation = {"method": "mtp", "num_speculative_tokens": VLLM_DRAFTS}
    flags = ["--max-model-len", "16384", "--kv-cache-memory-bytes", str(1 << 30)]
    flags += ["--speculative-config", json.dumps(speculation)] if drafts else []
    return Server(model, log, environment(), *flags, "--stream-interval", "8")


def sglang(model: Path, log: Path, *, drafts: bool) -> Server:
    nextn = ("--speculative-algo", "NEXTN", "--speculative-num-steps", str(SGLANG_DRAFTS))
    flags = ["--context-length", "16384", "--max-total-tokens", "40000", "--enable-metrics"]
    flags += nextn if drafts else ()
    return SGLangServer(model, log, environment(), *flags, "--stream-interval", "8")


def environment() -> dict[str, str]:
    """Drafts that pay; all else as users have it."""
    return os.environ | {"QWEN3NEXT_DRAFTS": "adaptive"}


def compare_answers(servers: dict[str, Load], config: dict[str, Any]) -> None:
    """Raise unless answers with MTP are those without, up to two nearly tied tokens."""
    requests = CASES[Name.CHECKPOINT].requests(config, 1, "check")
    batch = list(itertools.islice(requests, CHECKED))
    with console.status("check of the answers"):
        off, mtp = (servers[side].choices(batch) for side in (OFF, MTP))
    gaps = [one.gap_to(other) for one, other in zip(off, mtp, strict=True)]
    if max(gaps) > TIED:
        raise RedCheckError(f"an answer with MTP has a token that is {max(gaps):.3f} less likely")
    console.print(
        f"check: {gaps.count(0)} of {len(batch)} answers with MTP are those without; others differ"
        f" from where two tokens are at most {max(gaps):.3f} apart",
        highlight=False,
    )


@dataclass(frozen=True, slots=True)
class Pair:
    """The clients of one case, at both servers."""

    run: Run
    engine: Engine
    name: Name
    config: dict[str, Any]
    servers: dict[str, Load]

    @property
    def case(self) -> Case:
        return CASES[self.name]

    def rates(self) -> Record:
        """How many times as many tokens per second there are with MTP, by number of clients."""
        before = drafts(self.servers[MTP].server)
        rows = {f"{self.case.title}, {n}": partial(self.rate, n) for n in self.case.clients}
        found = self.in_turn(rows)
        self.check_drafts(before)
        return self.record("How many times as fast are answers with MTP, by clients?", found)

    def first_tokens(self) -> Record:
        """How many times as long it takes to the first token, by length of the prompt."""
        lengths = self.case.prompt
        found = self.in_turn({f"prompt of {n:,}": partial(self.first_token, n) for n in lengths})
        return self.record("How many times as long until the first token?", found)

    def in_turn(self, rows: dict[str, Callable[[Load, str], float]]) -> dict[str, Rounds]:
        """What each row measures of each server, by round, after a turn of each to warm up."""
        found: dict[str, Rounds] = {row: {side: [] for side in self.servers} for row in rows}
        said = f"{self.engine.title}, {self.name.value}"
        for row, load in itertools.product(rows, self.servers.values()):
            rows[row](load, "warm-up")
        turns = list(itertools.product(range(TURNS), rows))
        for round_, row in track(turns, said, console=console):
            sides = list(self.servers)[:: -1 if round_ % 2 else 1]
            pair = {side: rows[row](self.servers[side], f"{row} {round_}") for side in sides}
            for side, value in pair.items():
                found[row][side].append(value)
            line = (
                f"{said}, {row}: {pair[OFF]:.4g} → {pair[MTP]:.4g}, × {pair[MTP] / pair[OFF]:.3f}"
            )
            console.print(line, highlight=False)
        return found

    def rate(self, clients: int, load: Load, seed: str) -> float:
        """Tokens per second of so many clients, in one turn."""
        requests = self.case.requests(self.config, clients, seed)
        whole = self.case.whole and clients == 1
        seconds = self.case.clients[clients]
        rate, answers = load.rate(requests, clients, seconds, whole=whole)
        self.check_texts(answers)
        return rate

    def first_token(self, length: int, load: Load, seed: str) -> float:
        """Milliseconds until the first token after a prompt of this length: a turn's median."""
        case = replace(self.case, prompt=(length, length))
        time.sleep(BUSY_WAIT)
        requests = itertools.islice(case.requests(self.config, 1, seed), PROMPTS)
        found = [load.first_token(request) for request in requests]
        self.check_texts([answer for _, answer in found])
        return 1e3 * statistics.median(seconds for seconds, _ in found)

    def check_texts(self, answers: list[Answer]) -> None:
        """Raise unless all answers, also cut-off ones, are those that the chain model must give."""
        if self.case.model is Model.TINY:
            return  # compare_answers has checked
        for answer in answers:
            words, request = answer.text.split(), answer.request
            right = answer_of(self.config, request.prompt, request.tokens)
            complete = answer.tokens == request.tokens
            if words != right[: len(right) if complete else len(words)]:
                raise RedCheckError(f"{self.engine.title}: an answer is not the model's chain")

    def check_drafts(self, before: Drafts) -> None:
        """Raise unless the share of accepted drafts is what the model is made for.

        A case may have too few to say, where drafts do not pay; all cases of a model may not.
        """
        shares, now = {}, drafts(self.servers[MTP].server)
        for position, (verified, accepted) in sorted(now.items()):
            seen, right = verified - before[position][0], accepted - before[position][1]
            if seen >= SEEN:
                shares[position] = share = right / seen
                made = ACCEPTED.get(self.case.model, share)
                if abs(share - made) > max(WITHIN, DEVIATIONS * 0.5 / math.sqrt(seen)):
                    raise RedCheckError(f"{share:.1%} of the drafts at {position} are accepted")
        if self.case.model is Model.CHAIN and max(seen for seen, _ in now.values()) < SEEN:
            raise RedCheckError("too few drafts to say how many are accepted")
        said = ", ".join(f"{share:.3f}" for share in shares.values()) or "too few to say"
        console.print(f"check: drafts accepted by position: {said}", highlight=False)

    def record(self, question: str, found: dict[str, Rounds]) -> Record:
        """The median of the rounds' ratios, and their range."""
        title, rows = self.engine.title, {}
        for row, rounds in found.items():
            ratios = [mtp / off for off, mtp in zip(rounds[OFF], rounds[MTP], strict=True)]
            spread = f"{text(min(ratios))}–{text(max(ratios))}"
            rows[row] = {title: statistics.median(ratios), title + ROUNDS: spread}
        case = f"through HTTP, bf16, greedy; medians of {TURNS} rounds' ratios, and ranges"
        where = f"mtp/over_off/{self.engine.value}/{self.name.value}"
        return self.run.record(where, question, case, {title: "", title + ROUNDS: ""}, rows)


def drafts(server: Server) -> Drafts:
    """How many drafts were verified and accepted so far, by position."""
    verified, accepted = (
        server.samples(f"{server.ENGINE}:qwen3next_drafts_{what}_total", "position")
        for what in ("verified", "accepted")
    )
    return {position: (verified[position], accepted[position]) for position in verified}
