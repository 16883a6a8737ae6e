"""llama.cpp or ik_llama.cpp in its own process, timed step by step as benchmarks/engines does."""

import ctypes
import os
import random
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from benchmarks.worker import prompts, serve, vocabulary

CONTEXT, BATCH, SEQUENCES = 512, 512, 8  # tokens of a sequence, of a call; sequences
Logits = np.ndarray  # [vocabulary], fp32


class Library(Protocol):
    """One model in memory."""

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> None:
        """Read tokens; each gives logits."""

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
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(
            zip(tokens, positions, sequences, strict=True)
        ):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = 1
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
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> None:
        n = len(tokens)
        arrays = [(ctypes.c_int * n)(*values) for values in (tokens, positions, sequences)]
        if failed := self.peer.peer_decode(self.handle, n, *arrays, (ctypes.c_byte * n)(*[1] * n)):
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
        self.library.forget()
        sequences, tokens = range(batch), list[int]()
        for sequence in sequences:
            read = [self.random.randrange(2, self.vocabulary) for _ in range(32)]
            self.library.decode(read, range(len(read)), [sequence] * len(read))
            tokens.append(int(self._logits(len(read) - 1).argmax()))
        times = []
        for step in range(steps + 2):
            start = time.perf_counter()
            self.library.decode(tokens, [32 + step] * batch, sequences)
            tokens = [int(self._logits(i).argmax()) for i in sequences]
            times.append(1e3 * (time.perf_counter() - start))
        return times[2:]

    def logprobs(self, lengths: list[int]) -> list[list[float]]:
        """Log-probability of each prompt token but the first; the same prompts in every engine."""
        found = []
        for prompt in prompts(lengths, self.vocabulary):
            self.library.forget()
            self.library.decode(prompt, range(len(prompt)), [0] * len(prompt))
            found.append([self._logprob(i, token) for i, token in enumerate(prompt[1:])])
        return found

    def _logits(self, i: int) -> Logits:
        return np.ctypeslib.as_array(self.library.logits(i), (self.vocabulary,))

    def _logprob(self, i: int, token: int) -> float:
        logits = self._logits(i).astype(np.float64)
        return float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))


if __name__ == "__main__":
    serve(Engine)
