"""Record what a policy sees of a real engine, from the first request on: see --help.

The engine drafts random lengths, so that every cell (requests, tokens) is timed again and again;
then the longest, so that it is known how many drafts of each request are right. The events are
one JSON list a line, as they happen; `benchmarks.mtp.replay` reads what `--out` keeps of them.
"""

import asyncio
import itertools
import json
import os
import random
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers import Tokenizer

from benchmarks.block_model import TINY
from qwen3next_plugin.mtp import policy

EVENTS = "RECORD_EVENTS"  # file of the events; inherited by the engine's processes
STEPS = "RECORD_STEPS"  # steps with random lengths
IDLE = 24  # steps of a stretch without drafts, after which drafts cost what they have to catch up
IDLE_EVERY = 64  # steps, on average, between two such stretches
ANSWER = (64, 192)  # tokens
Request = tuple[list[int], int]  # prompt, and number of tokens of the answer


class Recorder(policy.Policy):
    """A policy that drafts random lengths, then the longest, and writes down every call."""

    def __init__(self, num_drafts: int) -> None:
        self.num_drafts = num_drafts
        self.random, self.left = random.Random(0), int(os.environ[STEPS])
        self.idle = 0  # steps left of a stretch without drafts
        self.file = os.open(os.environ[EVENTS], os.O_WRONLY | os.O_APPEND)

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        lengths = self._choose(len(requests))
        fed = sum(tokens for tokens, n in zip(pending, lengths, strict=True) if n)
        self._write("lengths", lengths, fed)
        return lengths

    def _choose(self, batch: int) -> list[int]:
        self.left -= 1
        if self.left < 0:
            return [self.num_drafts] * batch
        if not self.idle and self.random.random() < 1 / IDLE_EVERY:
            self.idle = IDLE
        if self.idle:
            self.idle -= 1
            return [0] * batch
        longest = self.random.randint(0, self.num_drafts)
        if self.random.random() < 0.5:
            return [longest] * batch
        return [self.random.randint(0, longest) for _ in range(batch)]

    def observe_verify(self, request: str, drafted: int, accepted: int, steps: int = 1) -> None:
        for _ in range(steps):
            self._write("verify", request, drafted, accepted)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        self._write("step", batch, tokens, round(1e6 * seconds))

    def observe_draft(self, batch: int, passes: int, seconds: float) -> None:
        self._write("draft", batch, passes, round(1e6 * seconds))

    def forget(self, request: str) -> None:
        self._write("forget", request)

    def _write(self, *event: Any) -> None:
        os.write(self.file, json.dumps(event).encode() + b"\n")


def use_recorder() -> None:
    """From now on engines of this process get a Recorder, whatever policy they ask for."""
    policy.make_policy = Recorder


def recording_scheduler(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler, a process of its own, with a Recorder."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    use_recorder()
    return run_scheduler_process(*args, **kwargs)


def vllm(
    model: Path, num_drafts: int, batch: int, requests: Iterator[Request], done: Callable[[], bool]
) -> None:
    """`batch` requests at a time until `done`."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    use_recorder()
    engine = LLM(
        model=str(model),
        max_model_len=2048,
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 29,
        speculative_config={"method": "mtp", "num_speculative_tokens": num_drafts},
    ).llm_engine
    names = itertools.count()
    active = 0
    for prompt, tokens in requests:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.add_request(str(next(names)), {"prompt_token_ids": prompt}, params)
        active += 1
        while active == batch:
            active -= sum(output.finished for output in engine.step())
        if done():
            return


def sglang(
    model: Path, num_drafts: int, batch: int, requests: Iterator[Request], done: Callable[[], bool]
) -> None:
    """`batch` requests at a time until `done`."""
    from sglang.srt.entrypoints.engine import Engine as Host

    class Engine(Host):
        run_scheduler_process_func = staticmethod(recording_scheduler)

    engine = Engine(
        model_path=str(model),
        device="cpu",
        context_length=2048,
        max_total_tokens=40000,
        max_running_requests=batch,
        skip_tokenizer_init=True,
        log_level="warning",
        speculative_algorithm="NEXTN",
        speculative_num_steps=num_drafts,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=num_drafts + 1,
    )

    async def client() -> None:
        while not done():
            prompt, tokens = next(requests)
            params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
            await engine.async_generate(input_ids=prompt, sampling_params=params)

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(batch)))

    engine.loop.run_until_complete(clients())
    engine.shutdown()


def requests_for(model: Path) -> Iterator[Request]:
    """Beginnings of Python source, over and over; random token ids without a tokenizer."""
    file, chance = model / "tokenizer.json", random.Random(1)
    tokenizer = Tokenizer.from_file(str(file)) if file.exists() else None
    source = Path(textwrap.__file__).read_text()
    for start in itertools.cycle(range(0, len(source) - 300, 171)):
        if tokenizer is not None:
            prompt = tokenizer.encode(source[start : start + 300]).ids
        else:
            prompt = [chance.randrange(2, 150_000) for _ in range(64)]
        yield prompt, chance.randint(*ANSWER)


def kept(events: Path, batch: int, num_drafts: int, steps: int) -> dict[str, Any]:
    """What a replay needs of the events.

    `steps`: [step, tokens, µs], `drafts`: [step, passes, draft tokens, µs] of full batches, `runs`:
    of each request, how many drafts were right in each step that drafted the longest, as digits,
    `pending`: µs of one pending token that the MTP layer reads before it drafts.
    """
    steps_, drafts, catching_up = [], [], []
    runs: dict[str, str] = {}
    step, lengths, fed = 0, list[int](), 0
    for line in events.open():
        kind, *values = json.loads(line)
        if kind == "lengths":
            step += 1
            lengths, fed = values
        elif kind == "step" and values[0] == batch and step < steps:
            steps_.append([step, *values[1:]])
        elif kind == "draft" and values[0] == batch == len(lengths) and step < steps:
            event = [step, values[1], sum(lengths), values[2]]
            (catching_up if fed >= IDLE * batch else drafts).append((fed, event))
        elif kind == "verify" and step > steps and values[1] == num_drafts:
            request, _, accepted = values
            runs[request] = runs.get(request, "") + str(accepted)
    usual = {
        passes: statistics.median(e[3] for _, e in drafts if e[1] == passes)
        for passes in {e[1] for _, e in drafts}
    }
    pending = [(e[3] - usual[e[1]]) / n for n, e in catching_up if e[1] in usual]
    return {
        "steps": steps_,
        "drafts": [event for _, event in drafts],
        "pending": round(statistics.median(pending), 1) if pending else None,
        "runs": [digits for digits in runs.values() if len(digits) >= 8],
    }


def main(
    engine: Annotated[str, typer.Option(help="vllm or sglang: the environment that runs this.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    model: Annotated[Path, typer.Option(help="Checkpoint.")] = TINY,
    batch: Annotated[int, typer.Option(help="Requests at a time.")] = 1,
    num_drafts: Annotated[int, typer.Option(help="Longest draft.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps with random lengths.")] = 1500,
    longest: Annotated[int, typer.Option(help="Steps with the longest drafts after them.")] = 300,
) -> None:
    """Record steps, drafts and verifications of a real engine, to replay policies on."""
    events = out.with_suffix(".events")
    os.environ |= {EVENTS: str(events.absolute()), STEPS: str(steps)}
    events.write_text("")

    def done() -> bool:
        return events.read_bytes().count(b'["lengths"') >= steps + longest

    run = {"vllm": vllm, "sglang": sglang}[engine]
    run(model, num_drafts, batch, requests_for(model), done)
    found = {"engine": engine, "model": model.name, "batch": batch, "num_drafts": num_drafts}
    out.write_text(
        json.dumps(found | kept(events, batch, num_drafts, steps), separators=(",", ":")) + "\n"
    )


if __name__ == "__main__":
    typer.run(main)
