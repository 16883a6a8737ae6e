"""`python -m sglang.launch_server`, except that the first process forks the others.

SGLang starts each as a new interpreter, which imports SGLang again: that is more than half of the
time until it serves. TEST_DRAFTS=0,3,1 makes drafts of these lengths in turn, step by step, and
TEST_PENDING is the size of the store of pending tokens in bytes.
"""

import itertools
import multiprocessing
import os
import runpy
from collections.abc import Sequence

from qwen3next_plugin.mtp import pending, policy


class Scripted(policy.Fixed):
    """Every request drafts as many tokens as it is the step's turn."""

    turns = itertools.cycle(map(int, os.environ.get("TEST_DRAFTS", "0").split(",")))

    def lengths(self, requests: Sequence[str], pending: Sequence[int]) -> list[int]:
        return [min(next(self.turns), self.length)] * len(requests)


if "TEST_DRAFTS" in os.environ:
    policy.make_policy = lambda config, max_draft, uniform: Scripted(max_draft)
if "TEST_PENDING" in os.environ:
    pending.Pending.__init__.__defaults__ = (int(os.environ["TEST_PENDING"]),)
multiprocessing.set_start_method("fork")
multiprocessing.set_start_method = lambda *method, **options: None  # SGLang asks for "spawn"
runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
