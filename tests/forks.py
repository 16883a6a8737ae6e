"""Code in forks of one process that has imported what takes seconds to import."""

import json
import multiprocessing
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

TESTS = Path(__file__).parent


class Ended(NamedTuple):
    """How a fork ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """A process that has imported `modules`; code runs in forks of it."""

    def __init__(self, *modules: str) -> None:
        ours = ("QWEN3NEXT_", "SGLANG_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        command = [sys.executable, "-m", "forks", *modules]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        env = clean | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=env, cwd=TESTS, **pipes)

    def run(self, code: str, **env: str) -> Ended:
        """Run the code, with these variables besides those of the tests."""
        print(json.dumps([code, env]), file=self.process.stdin, flush=True)
        return Ended(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        with self.process:  # closes its pipes
            self.process.kill()


def fork(code: str, env: dict[str, str], *streams: IO) -> None:
    """What a fork does."""
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    os.environ.update(env)
    exec(code, {"__name__": "__main__"})


def ended(code: str, env: dict[str, str]) -> Ended:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=fork, args=(code, env, out, err))
        process.start()
        process.join()
        texts = [stream.read() for stream in (out, err) if not stream.seek(0)]
        return Ended(process.exitcode, *texts)


def main(*modules: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print
    for module in modules:
        import_module(module)
    for line in sys.stdin:
        print(json.dumps(ended(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
