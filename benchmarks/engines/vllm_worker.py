"""vLLM in its own process, timed step by step; QWEN3NEXT_DISABLE switches the plugin off."""

import os
import random
import resource
import time
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process: steps can be timed

from vllm import LLM, SamplingParams

from benchmarks.worker import prompts, serve, vocabulary


class Engine:
    """vLLM's engine with a stopwatch around `step`."""

    def __init__(self, **flags: Any) -> None:
        self.llm = LLM(skip_tokenizer_init=True, disable_log_stats=True, **flags)
        self.engine = self.llm.llm_engine
        self.random, self.vocabulary = random.Random(0), vocabulary(flags["model"])
        self.count = 0

    def decode(self, batch: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` decode (or verify) steps of `batch` requests."""
        for _ in range(batch):
            self._add(self._prompt(32), 8 * (steps + 4))
        times: list[float] = []
        for _ in range(steps + 3):  # the first steps prefill, then drafts begin
            start = time.perf_counter()
            self.engine.step()
            times.append(1e3 * (time.perf_counter() - start))
        self._abort()
        return times[3:]

    def prefill(self, tokens: int) -> float:
        """Milliseconds of one fresh prompt of `tokens` tokens."""
        self._add(self._prompt(tokens), 1)
        start = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return 1e3 * (time.perf_counter() - start)

    def answer(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Tokens a second of greedy answers of so many tokens, behind their first; the answers.

        The rate is that until an answer ends. With drafts answers end apart, and a step of fewer
        requests takes almost as long: a server would have begun another answer by then.

        Raises: RuntimeError if the cache has no room for all requests at once: some would wait.
        """
        first = self.count + 1
        for prompt in prompts:
            self._add(prompt, tokens)
        together = len(self.engine.step())
        if together < len(prompts):
            raise RuntimeError(f"only {together} of {len(prompts)} requests fit into the cache")
        start, found, rate = time.perf_counter(), {}, 0.0
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                found[int(output.request_id) - first] = [*output.outputs[0].token_ids]
            if not rate and max(map(len, found.values())) == tokens:
                made = sum(len(answer) - 1 for answer in found.values())
                rate = made / (time.perf_counter() - start)
        return rate, [found[i] for i in range(len(prompts))]

    def logprobs(self, lengths: list[int]) -> list[list[float]]:
        """Log-probability of each prompt token but the first; the same prompts in every engine."""
        shared = prompts(lengths, self.vocabulary)
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in shared],
            SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
            use_tqdm=False,
        )
        return [
            [
                entry[token].logprob
                for token, entry in zip(prompt, output.prompt_logprobs, strict=True)
                if entry
            ]
            for prompt, output in zip(shared, outputs, strict=True)
        ]

    def peak_memory(self) -> float:
        """Peak resident memory in GB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def _prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(2, self.vocabulary) for _ in range(tokens)]

    def _add(self, prompt: list[int], max_tokens: int) -> None:
        self.count += 1
        params = SamplingParams(
            temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
        )
        self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, params)

    def _abort(self) -> None:
        self.engine.abort_request([str(i) for i in range(1, self.count + 1)])
        while self.engine.has_unfinished_requests():
            self.engine.step()


if __name__ == "__main__":
    serve(Engine)
