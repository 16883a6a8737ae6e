"""Time each decoder layer of vLLM, in a process of its own, at contexts that need not be read.

A context can be `skipped`: the attention layers skip its tokens, and their keys and values are
random. Later tokens take as long as after a context that was read. Linear layers read all
tokens, because their states hold their position.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.engines import vllm_worker
from benchmarks.worker import serve

Times = dict[str, float]  # milliseconds: of a layer of each kind, and of the `rest` of a step


class Engine(vllm_worker.Engine):
    """vLLM's engine with a stopwatch around each layer."""

    def __init__(self, **flags: Any) -> None:
        super().__init__(async_scheduling=False, **flags)
        self.skipping = False
        self.layers = 0
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.llm.apply_model(self._watch)
        self.llm.collective_rpc(fill_caches)

    def use(self, layers: int) -> None:
        """Pass by all but the first layers, from the next request on."""
        self.layers = layers

    def context(self, tokens: int, skipped: int, steps: int, batch: int = 1) -> list[list[Times]]:
        """The steps that read prompts of `tokens` tokens, then `steps` decode steps.

        The first `skipped` steps skip the attention layers; they are not timed.
        """
        for _ in range(batch):
            self._add(self._prompt(tokens), 8 * (tokens + steps))
        read: list[Times] = []
        started: set[str] = set()
        count = 0
        while len(started) < batch:
            self.skipping = count < skipped
            times, outputs = self._step()
            started |= {output.request_id for output in outputs if output.outputs[0].token_ids}
            read += [] if self.skipping else [times]
            count += 1
        self.skipping = False
        decoded = [self._step()[0] for _ in range(steps)]
        self._abort()
        return [read, decoded]

    def _step(self) -> tuple[Times, list[Any]]:
        self.seconds.clear()
        start = time.perf_counter()
        outputs = self.engine.step()
        took = time.perf_counter() - start
        rest = took - sum(map(sum, self.seconds.values()))
        means = {kind: 1e3 * sum(each) / len(each) for kind, each in self.seconds.items()}
        return means | {"rest": 1e3 * rest}, outputs

    def _watch(self, model: nn.Module) -> None:
        self.layers = len(model.model.layers)
        for i, layer in enumerate(model.model.layers):
            layer.forward = self._timed(layer.forward, i, is_full=hasattr(layer, "self_attn"))

    def _timed(self, forward: Callable[..., Any], i: int, *, is_full: bool) -> Callable[..., Any]:
        kind = "full_attention" if is_full else "linear_attention"

        def timed(positions: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
            if i >= self.layers or (self.skipping and is_full):
                return hidden, hidden.clone() if residual is None else residual
            start = time.perf_counter()
            result = forward(positions, hidden, residual)
            self.seconds[kind].append(time.perf_counter() - start)
            return result

        return timed


def fill_caches(worker: Any) -> None:
    """Random keys and values: pages that were never written are all one page of zeros."""
    for cache in worker.model_runner.kv_caches:
        if isinstance(cache, torch.Tensor) and cache.is_floating_point():
            cache.uniform_(-1, 1)


if __name__ == "__main__":
    serve(Engine)
