"""`python -m sglang.launch_server` in a fork of a process that has SGLang loaded, and by forks.

SGLang starts each process as a new interpreter, which imports SGLang again: that is most of the
time until it serves. TEST_DRAFTS=0,3,201 makes drafts of these lengths in turn, step by step: none,
three, and two, none and one for every first, second and third request. TEST_CHUNKS=24,8 makes the
chunks that fit a step's budget of so many tokens, in turn. TEST_PENDING is the size of the store of
pending tokens in bytes. With TEST_ON_DEVICE=1 it runs as on a GPU: see on_device.py.
TEST_LOAD_MEMORY names a file for the memory that loading the model takes: see load_memory.py.
"""

import itertools
import json
import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def scripted(turns: str) -> type:
    """Requests draft as many tokens as it is the step's turn; other ranks disagree."""
    from qwen3next_plugin.mtp import policy

    in_turn = itertools.cycle(turns.split(","))

    class Scripted(policy.Fixed):
        def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
            from sglang.srt.runtime_context import get_parallel

            turn = map(int, itertools.cycle(next(in_turn)))
            lengths = [min(length, self.length) for _, length in zip(requests, turn, strict=False)]
            if get_parallel().tp_rank:
                lengths = [self.length - length for length in lengths]
            return lengths

    return Scripted


def in_turn(chunks: str) -> Callable[..., int]:
    """So many tokens fit a step's budget, in turn; other ranks disagree."""
    turns = itertools.cycle(map(int, chunks.split(",")))

    def fit(*_: Any) -> int:
        from sglang.srt.runtime_context import get_parallel

        return next(turns) + 16 * get_parallel().tp_rank

    return fit


def forked(*flags: str) -> None:
    """Serve, in this fork and in forks of it."""
    from engines.sglang import loaded

    os.environ.update(loaded.ENVIRONMENT)
    import torch
    from sglang.srt.environ import envs
    from sglang.srt.managers import scheduler

    from qwen3next_plugin.engines import pacing
    from qwen3next_plugin.mtp import pending, policy

    scheduler.TEST_RETRACT = envs.SGLANG_TEST_RETRACT.get()  # read when it was imported
    scheduler.TEST_RETRACT_INTERVAL = envs.SGLANG_TEST_RETRACT_INTERVAL.get()
    # Sampling with seeds, for one, is compiled at its first call, which takes seconds.
    torch.compiler.set_stance("force_eager")
    if turns := os.environ.get("TEST_DRAFTS"):
        policy.make_policy = scripted(turns)
    if chunks := os.environ.get("TEST_CHUNKS"):
        pacing.Costs.fit = in_turn(chunks)
    if size := os.environ.get("TEST_PENDING"):
        pending.Pending.__init__.__defaults__ = (int(size),)
    if os.environ.get("TEST_ON_DEVICE"):
        from engines.sglang import on_device

        on_device.switch()
    if path := os.environ.get("TEST_LOAD_MEMORY"):
        from sglang.srt.model_loader.loader import DefaultModelLoader

        from engines.load_memory import measured

        DefaultModelLoader.load_model = measured(
            DefaultModelLoader.load_model,
            lambda found: Path(path).write_text(json.dumps(found)),
        )
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *method, **options: None  # SGLang asks for "spawn"
    sys.argv[1:] = flags
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
