"""SGLang in its own process, timed token by token; the same calls as `vllm_worker`.

Run by `benchmarks.engines.steps` with the Python of SGLang's environment. A step is the time
between two tokens of one streamed request, so it includes everything that a user waits for.
"""

import asyncio
import random
import time
from itertools import pairwise
from typing import Any

from benchmarks.worker import prompts, serve, vocabulary


class Engine:
    """SGLang's engine without HTTP; its scheduler is another process."""

    def __init__(self, **flags: Any) -> None:
        import sglang

        self.engine = sglang.Engine(skip_tokenizer_init=True, log_level="warning", **flags)
        self.random, self.vocabulary = random.Random(0), vocabulary(flags["model_path"])

    def decode(self, batch: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` decode steps of `batch` requests."""
        return self.engine.loop.run_until_complete(self._decode(batch, steps))

    async def _decode(self, batch: int, steps: int) -> list[float]:
        last = asyncio.gather(*(self._stream(32, 2 * steps + 8) for _ in range(batch)))
        arrivals = (await last)[0]
        gaps = [1e3 * (b - a) for a, b in pairwise(arrivals)]
        return gaps[-steps - 4 : -4]  # past the prefills, and before the first request ends

    async def _stream(self, tokens: int, new_tokens: int) -> list[float]:
        arrivals = []
        stream = await self.engine.async_generate(
            input_ids=self._prompt(tokens),
            sampling_params={"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True},
            stream=True,
        )
        async for _ in stream:
            arrivals.append(time.perf_counter())
        return arrivals

    def prefill(self, tokens: int) -> float:
        """Milliseconds of one fresh prompt of `tokens` tokens."""
        start = time.perf_counter()
        self.engine.generate(
            input_ids=self._prompt(tokens),
            sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True},
        )
        return 1e3 * (time.perf_counter() - start)

    def logprobs(self, lengths: list[int]) -> list[list[float]]:
        """Log-probability of each prompt token but the first; the same prompts in every engine."""
        shared = prompts(lengths, self.vocabulary)
        outputs = self.engine.generate(
            input_ids=shared,
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            logprob_start_len=0,
        )
        return [
            [logprob for logprob, *_ in output["meta_info"]["input_token_logprobs"][1:]]
            for output in outputs
        ]

    def _prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(2, self.vocabulary) for _ in range(tokens)]


if __name__ == "__main__":
    serve(Engine).engine.shutdown()
