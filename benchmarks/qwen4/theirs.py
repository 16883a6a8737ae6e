"""transformers' own Qwen4-Exp in its own process: prompts, and their log-probabilities."""

import random
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.worker import prompts, serve, vocabulary


class Engine:
    """The model in bf16, called as a user of transformers does."""

    def __init__(self, *, model: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        self.random, self.vocabulary = random.Random(0), vocabulary(model)

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        """Milliseconds of one fresh prompt of `tokens` tokens."""
        prompt = [self.random.randrange(2, self.vocabulary) for _ in range(tokens)]
        begin = time.perf_counter()
        self.model(torch.tensor([prompt]), logits_to_keep=1)
        return 1e3 * (time.perf_counter() - begin)

    @torch.inference_mode()
    def logprobs(self, lengths: list[int]) -> list[list[float]]:
        """Log-probability of each prompt token but the first; the same prompts in every engine."""
        found = []
        for prompt in prompts(lengths, self.vocabulary):
            ids = torch.tensor([prompt])
            scores = self.model(ids).logits[0, :-1].float().log_softmax(-1)
            found.append(scores.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return found


if __name__ == "__main__":
    serve(Engine)
