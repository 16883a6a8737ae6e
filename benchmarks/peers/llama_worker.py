"""llama.cpp or ik_llama.cpp in its own process, timed step by step as benchmarks/engines does."""

import ctypes
import os
import random
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from benchmarks.worker import prompts, serve, vocabulary

CONTEXT, BATCH, SEQUENCES = 1280, 512, 8  # tokens of a sequence, of a call; sequences
Logits = np.ndarray  # [vocabulary], fp32


class Library(Protocol):
    """One model in memory."""

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        """Read tokens; those that are wanted give logits."""

    def logits(self, i: int) -> "ctypes._Pointer[ctypes.c_float]":
        """Logits of the i-th token of the last call."""

    def forget(self) -> None:
        """Forget all tokens."""


class LlamaCpp:
    """llama.cpp by the low-level functions of llama-cpp-python."""

    def __init__(self, path: str, threads: int) -> None:
        import llama_cpp

        self.llama = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = CONTEXT * SEQUENCES
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, SEQUENCES)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, want) in enumerate(
            zip(tokens, positions, sequences, wanted, strict=True)
        ):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, want
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if failed := self.llama.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {failed}")

    def logits(self, i: int) -> "ctypes._Pointer[ctypes.c_float]":
        return self.llama.llama_get_logits_ith(self.context, i)

    def forget(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)


class IkLlama:
    """ik_llama.cpp by ik.cpp."""

    def __init__(self, path: str, threads: int) -> None:
        self.peer = ctypes.CDLL(".peers/ik_llama.cpp/libpeer.so")
        self.peer.peer_open.restype = ctypes.c_void_p
        self.peer.peer_logits.restype = ctypes.POINTER(ctypes.c_float)
        self.handle = ctypes.c_void_p(
            self.peer.peer_open(path.encode(), threads, CONTEXT * SEQUENCES, SEQUENCES, BATCH)
        )
        if not self.handle:
            raise RuntimeError(f"{path}: not opened")

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[int],
        wanted: Sequence[bool],
    ) -> None:
        n = len(tokens)
        arrays = [(ctypes.c_int * n)(*values) for values in (tokens, positions, sequences)]
        if failed := self.peer.peer_decode(self.handle, n, *arrays, (ctypes.c_byte * n)(*wanted)):
            raise RuntimeError(f"llama_decode returned {failed}")

    def logits(self, i: int) -> "ctypes._Pointer[ctypes.c_float]":
        return self.peer.peer_logits(self.handle, i)

    def forget(self) -> None:
        self.peer.peer_forget(self.handle)


class Engine:
    """A library with a stopwatch: the calls of benchmarks/engines/vllm_worker.py."""

    def __init__(self, *, library: str, model: str, config: str) -> None:
        """Load a GGUF file `model` with a library; `config` is the folder it was made of."""
        threads = len(os.sched_getaffinity(0))
        kind = {"llama.cpp": LlamaCpp, "ik_llama.cpp": IkLlama}[library]
        self.library: Library = kind(model, threads)
        self.random, self.vocabulary = random.Random(0), vocabulary(config)

    def decode(self, batch: int, steps: int) -> list[float]:
        """Milliseconds of each of `steps` greedy steps of `batch` sequences, 32 tokens read."""
        tokens = self._read([self._prompt(32) for _ in range(batch)])
        times = []
        for step in range(steps + 2):
            start = time.perf_counter()
            tokens = self._step(tokens, 32 + step)
            times.append(1e3 * (time.perf_counter() - start))
        return times[2:]

    def prefill(self, tokens: int) -> float:
        """Milliseconds of one fresh prompt of `tokens` tokens."""
        prompt = self._prompt(tokens)
        start = time.perf_counter()
        self._read([prompt])
        return 1e3 * (time.perf_counter() - start)

    def answer(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        """Tokens a second of greedy answers of so many tokens, behind their first; the answers."""
        found = [self._read(prompts)]
        start, length = time.perf_counter(), len(prompts[0])
        for step in range(tokens - 1):
            found.append(self._step(found[-1], length + step))
        rate = len(prompts) * (tokens - 1) / (time.perf_counter() - start)
        return rate, [list(answer) for answer in zip(*found, strict=True)]

    def logprobs(self, lengths: list[int]) -> list[list[float]]:
        """Log-probability of each prompt token but the first; the same prompts in every engine."""
        found = []
        for prompt in prompts(lengths, self.vocabulary):
            self.library.forget()
            n = len(prompt)
            self.library.decode(prompt, range(n), [0] * n, [True] * n)
            found.append([self._logprob(i, token) for i, token in enumerate(prompt[1:])])
        return found

    def _prompt(self, tokens: int) -> list[int]:
        return [self.random.randrange(2, self.vocabulary) for _ in range(tokens)]

    def _read(self, prompts: list[list[int]]) -> list[int]:
        """Forget all, read a prompt for each sequence; the likeliest token after each."""
        self.library.forget()
        found = []
        for sequence, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), BATCH):
                part = prompt[begin : begin + BATCH]
                positions = range(begin, begin + len(part))
                wanted = [position == len(prompt) - 1 for position in positions]
                self.library.decode(part, positions, [sequence] * len(part), wanted)
            found.append(self._likeliest(len(part) - 1))
        return found

    def _step(self, tokens: list[int], position: int) -> list[int]:
        """Read a token of each sequence; the likeliest token after each."""
        n = len(tokens)
        self.library.decode(tokens, [position] * n, range(n), [True] * n)
        return [self._likeliest(i) for i in range(n)]

    def _likeliest(self, i: int) -> int:
        return int(self._logits(i).argmax())

    def _logits(self, i: int) -> Logits:
        return np.ctypeslib.as_array(self.library.logits(i), (self.vocabulary,))

    def _logprob(self, i: int, token: int) -> float:
        logits = self._logits(i).astype(np.float64)
        return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


if __name__ == "__main__":
    serve(Engine)
