"""vLLM with a stopwatch around the parts that only Qwen3.8-Flash-Next has, and its memory."""

import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.engines import vllm_worker
from benchmarks.worker import serve
from qwen3next_plugin.extras.qwen4_exp.hyper_connection import HyperConnection
from qwen3next_plugin.extras.qwen4_exp.ple import PerLayerEmbedding

KINDS = {HyperConnection: "hyper-connections", PerLayerEmbedding: "n-grams"}


class Engine(vllm_worker.Engine):
    """vLLM's engine, not compiled: modules are timed as they are called."""

    def __init__(self, **flags: Any) -> None:
        super().__init__(async_scheduling=False, enforce_eager=True, **flags)
        self.seconds: dict[str, float] = defaultdict(float)
        self.llm.apply_model(self._watch)

    def shares(self, steps: int) -> dict[str, float]:
        """Milliseconds of the shortest of some decode steps of one request, and of its parts."""
        self._add(self._prompt(32), 2 * steps + 8)
        found = []
        for _ in range(steps + 3):
            self.seconds.clear()
            begin = time.perf_counter()
            self.engine.step()
            took = time.perf_counter() - begin
            parts = {kind: 1e3 * self.seconds[kind] for kind in KINDS.values()}
            found.append({"step": 1e3 * took} | parts)
        self._abort()
        return min(found[3:], key=lambda times: times["step"])

    def resident(self) -> float:
        """Resident memory in bytes, pages of mapped files included."""
        status = Path("/proc/self/status").read_text()
        return 1024.0 * int(status.partition("VmRSS:")[2].split()[0])

    def read(self, tokens: int, *, random: bool) -> None:
        """Prefill that many random tokens, or one token again and again."""
        prompt = self._prompt(tokens) if random else [2] * tokens
        self._add(prompt, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()

    def _watch(self, model: nn.Module) -> None:
        for module in model.modules():
            for kind, name in KINDS.items():
                if isinstance(module, kind):
                    module.forward = self._timed(module.forward, name)

    def _timed(self, forward: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = forward(*arguments)
            self.seconds[kind] += time.perf_counter() - begin
            return result

        return timed


if __name__ == "__main__":
    serve(Engine)
