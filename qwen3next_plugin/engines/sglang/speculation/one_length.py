"""Our policy behind SGLang's --speculative-adaptive, on GPUs: one length for all requests.

There SGLang has graphs for each number of drafts. It asks for the number before each step, and
reports afterwards how many drafts were accepted. Its own policy compares these with thresholds;
ours also knows what steps cost.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.mtp.costs import Costs, Table, guess_draft, guess_step
from qwen3next_plugin.mtp.loop import EVERY
from qwen3next_plugin.mtp.policy import Adaptive, Chances, Plan

ALIKE = 2  # consecutive steps with equal drafts before one is timed: SGLang runs a step ahead
TRIAL = 6  # steps of a trial: the first two are not timed


def guess_whole(drafts: float) -> float:
    """Guessed cost of a step and the drafting before it, which are only timed together."""
    return guess_step(drafts) + (guess_draft(drafts) if drafts else 0.0)


class Alike(Adaptive):
    """The policy with the same number of drafts for every request."""

    trial_steps = TRIAL

    @staticmethod
    def plans(chances: Chances, table: Table) -> list[Plan]:
        B = len(chances)
        tokens = accumulate(map(sum, zip(*chances, strict=True)), initial=float(B))
        return [Plan([n] * B, all_, table.step[n * B]) for n, all_ in enumerate(tokens)]


def names(batch: int) -> list[str]:
    """Names of a batch's requests: their places in the batch, because SGLang gives no ids."""
    return [str(i) for i in range(batch)]


class OneLength:
    """A policy as SGLang's AdaptiveController expects it."""

    def __init__(
        self,
        candidates: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`candidates`: the numbers of drafts that there are graphs for."""
        self.candidate_steps = sorted(candidates)
        self.policy = Alike(self.candidate_steps[-1], Costs(guess_whole))
        self.clock, self.began, self.batch_size = clock, 0.0, 0  # of the last step
        self.graphs: list[int] | None = None  # batch sizes
        self.steps, self.wait = self.candidate_steps[-1], 0  # steps until another choice
        self.launched = deque[int]()  # drafts of steps without a result yet
        self.alike = 0  # consecutive steps with `steps` drafts

    def set_cuda_graph_bs(self, cuda_graph_bs: list[int] | None) -> None:
        self.graphs = cuda_graph_bs

    def cuda_graph_bs_for_step(self, step: int) -> list[int] | None:
        """All batch sizes: any number of drafts may be best at each."""
        return self.graphs

    def get_steps_for_batch(self, batch_size: int) -> int:
        """The number of drafts of the step that begins now."""
        self._time(batch_size)
        self.wait -= 1
        if self.wait <= 0:
            before = self.steps
            self.steps, self.wait = self._choose(batch_size)
            self.alike = self.alike if self.steps == before else 0
        self.launched.append(self.steps)
        return self.steps

    def on_verify_complete(self, num_correct_drafts_per_req: list[int], batch_size: int) -> None:
        """Learn what a step accepted. The number of drafts changes only at the start of a step."""
        drafted = self.launched.popleft()
        for name, accepted in zip(names(batch_size), num_correct_drafts_per_req, strict=False):
            self.policy.observe_verify(name, drafted, min(accepted, drafted))

    def _choose(self, batch_size: int) -> tuple[int, int]:
        """The number of drafts and when to choose again; of the first rank on all ranks."""
        length = self.policy.lengths(names(batch_size), [0] * batch_size)[0]
        steps = [n for n in self.candidate_steps if n <= length][-1:] or self.candidate_steps[:1]
        on_trial = self.policy.trial != self.policy.plan
        wait = 1 if on_trial else EVERY
        group = get_parallel().tp_group
        found: tuple[int, int] = group.broadcast_object((steps[0], wait), src=0)
        return found

    def _time(self, batch_size: int) -> None:
        """Time the last step if it was like those before it and no prompt followed."""
        now, batch = self.clock(), self.batch_size
        self.alike += 1
        if self.alike >= ALIKE and batch_size <= batch:
            self.policy.observe_step(batch, batch * (1 + self.steps), now - self.began)
        self.began, self.batch_size = now, batch_size
