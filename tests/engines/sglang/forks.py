"""Code in forks of one process that has imported SGLang, because importing it takes seconds."""

import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, NamedTuple

TESTS = Path(__file__).parents[2]
# Besides what the plugin's patches import.
MODULES = ("srt.model_executor.cpu_graph_runner", "srt.speculative.eagle_utils")


class Ended(NamedTuple):
    """How a fork ended, and what it wrote."""

    returncode: int
    stdout: str
    stderr: str


class Forks:
    """A process that has imported SGLang, but loaded no plugin; code runs in forks of it."""

    def __init__(self) -> None:
        ours = ("QWEN3NEXT_", "SGLANG_")
        clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        command = [sys.executable, "-m", "engines.sglang.forks"]
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


def prepare() -> None:
    """Import what SGLang imports before its plugins load, and their patches' targets."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    from importlib import import_module

    from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide

    provide()
    import_module("qwen3next_plugin.engines.sglang.patches")
    for name in MODULES:
        import_module(f"sglang.{name}")


def fork(code: str, env: dict[str, str], *streams: IO) -> None:
    """What a fork does; SGLang then looks for its platform anew."""
    from sglang.srt import platforms

    for number, stream in enumerate(streams, 1):
        os.dup2(stream.fileno(), number)
    os.environ.update(env)
    platforms._current_platform = None
    exec(code, {"__name__": "__main__"})


def ended(code: str, env: dict[str, str]) -> Ended:
    with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
        context = multiprocessing.get_context("fork")
        process = context.Process(target=fork, args=(code, env, out, err))
        process.start()
        process.join()
        texts = [stream.read() for stream in (out, err) if not stream.seek(0)]
        return Ended(process.exitcode, *texts)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # imports may print
    prepare()
    for line in sys.stdin:
        print(json.dumps(ended(*json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
