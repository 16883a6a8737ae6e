"""A vLLM engine in a process of its own, driven over a pipe: several may follow one another."""

import os
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

from engines.checks import Output
from engines.process import CPUS, OWN_CPUS, START_SECONDS, Fork, Process
from engines.vllm import child

Prompt = tuple[int, ...] | dict[str, Any]  # token ids, or as vLLM takes it
CHILD = str(Path(__file__).with_name("child.py"))
# One process, and one thread in it: at these sizes threads only cost time. A server has OWN_CPUS.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}


def environment(tp_size: int = 1) -> dict[str, str]:
    """The environment a vLLM process gets: this one's, its threads bound to our cores."""
    ranks = [CPUS[rank::tp_size] for rank in range(tp_size)] if tp_size > 1 else [OWN_CPUS]
    return os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, cpus)) for cpus in ranks),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }


def preload() -> None:
    """Import vLLM in the process that engines are forked from."""
    Fork.preload(["engines.vllm.loaded"], environment() | IN_PROCESS)


class Offline:
    """`vllm.LLM(model, **flags)` in a child; token ids in, plain values out.

    The child is a fork of a process that has vLLM loaded, with another `python` a new interpreter.
    `first` names a module in this folder that a fork imports before all else.
    """

    def __init__(
        self,
        model: Path,
        *,
        env: dict[str, str] | None = None,
        python: str = sys.executable,
        first: str | None = None,
        **flags: Any,
    ) -> None:
        tp_size = flags.get("tensor_parallel_size", 1)
        with Listener(family="AF_UNIX") as listener:
            listener._listener._socket.settimeout(START_SECONDS)
            own = environment(tp_size) | IN_PROCESS | (env or {})
            if python != sys.executable:
                self.process = Process([python, CHILD, listener.address], own)
            else:
                preload()
                modules = [f"engines.vllm.{first}"] if first else []
                self.process = Fork(child.main, listener.address, *modules, env=own)
            self.pipe: Connection = listener.accept()
        defaults = {
            "model": str(model),
            "skip_tokenizer_init": True,
            "enforce_eager": True,
            "seed": 0,
            "disable_log_stats": False,
            "kv_cache_memory_bytes": 1 << 28,  # it is filled with zeros
        }
        try:
            self._ask("start", defaults | flags)
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: list[Prompt], each: Sequence[dict[str, Any]] = ({},), **params: Any
    ) -> list[list[Output]]:
        """Run all prompts in one batch: n outputs each, through the LoRA `adapter` if given.

        `params` are vLLM's SamplingParams for all prompts, `each` holds more for each of them.
        """
        defaults = {"detokenize": False, "ignore_eos": True} | params
        params = [defaults | own for own in each]
        answers = self._ask("generate", prompts, params)
        return [[Output(**fields) for fields in answer] for answer in answers]

    def greedy(self, prompts: list[Prompt], tokens: int, **params: Any) -> list[Output]:
        """Run all prompts in one batch, greedily."""
        outputs = self.generate(prompts, temperature=0.0, max_tokens=tokens, **params)
        return [output for (output,) in outputs]

    def counters(self) -> dict[str, float]:
        """vLLM's Prometheus counters by name, summed over labels; `name[0]` is of position 0."""
        return self._ask("counters")

    def cache(self) -> dict[str, Any]:
        """The block size and number of blocks that the engine settled on."""
        return self._ask("cache")

    def forget(self) -> None:
        """Empty the prefix cache."""
        self._ask("forget")

    def inside(self, name: str, *args: Any, **options: Any) -> Any:
        """Call a function of inside.py where the engine is."""
        return self._ask("inside", name, args, options)

    def close(self) -> None:
        self.pipe.close()
        self.process.stop()

    def _ask(self, name: str, *args: Any) -> Any:
        try:
            self.pipe.send((name, args))
            ok, answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.wait(20)
            raise AssertionError(f"the engine died:\n{self.process.text()[-8000:]}") from error
        if not ok:
            raise AssertionError(f"{answer}\n{self.process.text()[-8000:]}")
        return answer
