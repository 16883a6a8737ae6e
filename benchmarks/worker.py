"""An engine in a process of its own, called over a pipe: both ends.

A benchmark holds a `Worker`; its process runs `serve(Engine)`. Calls and answers are JSON, one a
line: {"call": "decode", "batch": 8, "steps": 16} in, {"result": [...]} out.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import track

from benchmarks.report import console
from qwen3next_plugin.machine.huge_pages import TORCH_SETTING

VLLM = "benchmarks.engines.vllm_worker"
VLLM_LAYERS = "benchmarks.engines.layer_worker"
SGLANG = "benchmarks.engines.sglang_worker"
FIXED = {"QWEN3NEXT_DRAFTS": "fixed"}  # as many drafts in each step
PROMPTS = (3, 65, 200)  # lengths of the prompts that are compared
SGLANG_PYTHON = Path(".venv-sglang/bin/python")


def serve(start: Callable[..., Any]) -> Any:
    """Start an engine with the flags of the command line; answer calls until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines log to standard output
    engine = start(**json.loads(sys.argv[1]))
    print(json.dumps({"result": "ready"}), file=answers)
    for line in sys.stdin:
        arguments = json.loads(line)
        result = getattr(engine, arguments.pop("call"))(**arguments)
        print(json.dumps({"result": result}), file=answers)
    return engine


def vocabulary(model: str) -> int:
    """How many tokens random prompts are drawn from."""
    return json.loads((Path(model) / "config.json").read_text())["vocab_size"]


def prompts(lengths: Sequence[int], vocabulary: int) -> list[list[int]]:
    """Random prompts, the same in every engine."""
    shared = random.Random(1)
    return [[shared.randrange(2, vocabulary) for _ in range(n)] for n in lengths]


def _switches(*, plugin: bool) -> dict[str, str]:
    """Variables of an engine with or without the plugin.

    The plugin sets torch's for the workers of a server; here the engine is in the first process.
    """
    return {"QWEN3NEXT_DISABLE": str(int(not plugin))} | ({TORCH_SETTING: "1"} if plugin else {})


class Worker:
    """A process with one engine; `plugin` switches the plugin on or off in it, `env` sets it up."""

    def __init__(
        self,
        name: str,
        flags: dict[str, Any],
        log: Path,
        *,
        plugin: bool = True,
        env: Mapping[str, str] | None = None,
        module: str = VLLM,
    ) -> None:
        self.name = name
        python = SGLANG_PYTHON if module == SGLANG else Path(sys.executable)
        self.log = log.open("w")
        process = self.process = subprocess.Popen(
            [str(python), "-m", module, json.dumps(flags)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | _switches(plugin=plugin) | dict(env or {}),
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self.calls, self.answers = process.stdin, process.stdout

    def answer(self) -> Any:
        """Wait for the worker's next answer."""
        line = self.answers.readline()
        if not line:
            raise RuntimeError(f"the worker {self.name} died: see {self.log.name}")
        return json.loads(line)["result"]

    def call(self, name: str, **arguments: Any) -> Any:
        """Call a method of the worker's engine and wait for the result."""
        self.calls.write(json.dumps({"call": name, **arguments}) + "\n")
        self.calls.flush()
        return self.answer()

    def logprobs(self) -> list[float]:
        """Log-probabilities of the prompts that all workers share."""
        return [x for prompt in self.call("logprobs", lengths=PROMPTS) for x in prompt]

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.log.close()


@contextmanager
def started(worker: Worker) -> Iterator[Worker]:
    """Wait until a worker is ready; stop it at the end.

    Start workers one after the other where memory is measured: mapped pages of a checkpoint that
    two processes share are not given back.
    """
    try:
        with console.status(f"starting {worker.name}"):
            worker.answer()
        yield worker
    finally:
        worker.stop()


def alternate(
    workers: dict[str, Worker], rounds: int, call: str, **arguments: Any
) -> dict[str, list]:
    """Call all workers in turn, `rounds` times."""
    results: dict[str, list] = {name: [] for name in workers}
    said = f"{call} {', '.join(f'{k} {v}' for k, v in arguments.items())}"
    for _ in track(range(rounds), f"{said}: {' and '.join(workers)} in turn", console=console):
        for name, worker in workers.items():
            results[name].append(worker.call(call, **arguments))
    return results
