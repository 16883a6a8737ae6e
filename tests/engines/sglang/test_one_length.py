"""Our policy behind SGLang's own controller of the number of drafts, with a worker that sleeps."""

import random
from collections import Counter, deque
from types import SimpleNamespace as Bag

import pytest

CANDIDATES = [0, 1, 3]


class Machine:
    """A worker for SGLang's controller: steps take time, and one is always ahead of its result."""

    def __init__(self, right: float, one_length, *, token: float) -> None:
        """`right`: the chance that a draft is; `token`: what each costs, in plain steps."""
        from sglang.srt.speculative.adaptive_runtime_state import AdaptiveController

        self.right, self.token, self.now = right, token, 0.0
        self.speculative_num_steps = CANDIDATES[-1]
        self.policy = one_length.OneLength(CANDIDATES, clock=lambda: self.now)
        self.controller = AdaptiveController(self, self.policy)
        self.controller.init_states([1, 8])
        self.random, self.unseen, self.chosen = random.Random(1), deque(), []

    def build_adaptive_runtime_state(self, **sizes):
        assert sizes["cuda_graph_bs"] == [1, 8]
        return sizes["speculative_num_steps"]

    def apply_runtime_state(self, state) -> None:
        self.speculative_num_steps = state

    def run(self, steps: int, batch: int) -> Counter:
        """How often each number of drafts was chosen."""
        chosen = Counter()
        for _ in range(steps):
            self.controller.activate_step_by_batch(batch)
            n = self.speculative_num_steps
            chosen[n] += 1
            self.unseen.append([self.accepted(n) for _ in range(batch)])
            self.now += (1 + self.token * n * batch) * self.random.uniform(0.9, 1.1)
            if len(self.unseen) > 1:
                found = self.unseen.popleft()
                self.controller.on_verify_complete(found, batch_size=len(found))
        return chosen

    def accepted(self, drafts: int) -> int:
        return next((i for i in range(drafts) if self.random.random() > self.right), drafts)


@pytest.fixture
def one_length(monkeypatch):
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from qwen3next_plugin.engines.sglang.speculation import one_length

    group = Bag(broadcast_object=lambda found, src: found)
    monkeypatch.setattr(one_length, "get_parallel", lambda: Bag(tp_group=group))
    return one_length


@pytest.mark.parametrize(
    ("right", "token", "best"), [(0.95, 0.1, 3), (0.0, 0.1, 0), (0.5, 0.25, 1)]
)
def test_the_number_that_pays_is_chosen_most(one_length, right, token, best):
    machine = Machine(right, one_length, token=token)
    machine.run(300, batch=1)
    found = machine.run(600, batch=1)
    assert found[best] > 0.85 * 600, found


def test_more_requests_draft_less(one_length):
    machine = Machine(0.8, one_length, token=0.15)
    machine.run(300, batch=1)
    assert machine.run(300, batch=1)[3] > 0.8 * 300
    machine.run(300, batch=16)
    assert machine.run(300, batch=16)[0] > 0.8 * 300


def test_all_ranks_draft_what_the_first_decides(one_length, monkeypatch):
    decided = deque()
    first, second = (Machine(0.9, one_length, token=0.1) for _ in range(2))
    second.token = 9.0  # its clock says that drafts never pay

    def of_the_first(found, src):
        return decided.popleft() if decided else decided.append(found) or found

    group = Bag(broadcast_object=of_the_first)
    monkeypatch.setattr(one_length, "get_parallel", lambda: Bag(tp_group=group))
    for _ in range(400):
        assert first.run(1, batch=2) == second.run(1, batch=2)
