"""`python -m sglang.launch_server`, except that the first process forks the others.

SGLang starts each as a new interpreter, which imports SGLang again: that is more than half of the
time until it serves. TEST_DRAFTS=0,3,201 makes drafts of these lengths in turn, step by step: none,
three, and two, none and one for every first, second and third request. TEST_PENDING is the size of
the store of pending tokens in bytes.
"""

import itertools
import multiprocessing
import os
import runpy
import sys
from collections.abc import Sequence


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


def main(*flags: str) -> None:
    """Serve, in this process and in forks of it."""
    from qwen3next_plugin.mtp import pending, policy

    if turns := os.environ.get("TEST_DRAFTS"):
        policy.make_policy = scripted(turns)
    if size := os.environ.get("TEST_PENDING"):
        pending.Pending.__init__.__defaults__ = (int(size),)
    multiprocessing.set_start_method("fork", force=True)
    multiprocessing.set_start_method = lambda *method, **options: None  # SGLang asks for "spawn"
    sys.argv[1:] = flags
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


def forked(*flags: str) -> None:
    """The same in a process that has imported SGLang in another environment."""
    from engines.sglang import loaded

    os.environ.update(loaded.ENVIRONMENT)
    from sglang.srt.environ import envs
    from sglang.srt.managers import scheduler

    scheduler.TEST_RETRACT = envs.SGLANG_TEST_RETRACT.get()  # read when it was imported
    scheduler.TEST_RETRACT_INTERVAL = envs.SGLANG_TEST_RETRACT_INTERVAL.get()
    main(*flags)


if __name__ == "__main__":
    main(*sys.argv[1:])
