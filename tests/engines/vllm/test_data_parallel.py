"""Two data-parallel engines answer as one server does, each with drafts and metrics of its own."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.checks import check_greedy
from engines.clients import eventually
from engines.process import CPUS, Fork, Process
from engines.traffic import source_tokens
from engines.vllm.offline import preload
from engines.vllm.server import Server, greedy, serve
from family import FAMILY
from needs import needs
from tiers import long_except

pytestmark = [
    pytest.mark.serve,
    needs("two-cores"),
]

CHUNK = 256
PROMPTS = [tuple(source_tokens()[start : start + n]) for start, n in ((0, 20), (300, 600), (90, 1))]
TOKENS = 24
EXPERTS = {"shared": ["--enable-expert-parallel"], "in each": []}


class Replicas(Server):
    """All of its processes are forks, and each engine has one core."""

    def __init__(self, model, *flags: str) -> None:
        super().__init__(
            model,
            *("--dtype", "float32", "--max-model-len", "2048", "--enforce-eager"),
            *("--max-num-batched-tokens", str(CHUNK), "--data-parallel-size", "2"),
            *("--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": 3})),
            *flags,
            env={"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, CPUS[:2]))},
        )

    def start(self, env: dict[str, str], *flags: str) -> Process:
        preload()
        return Fork(serve, *self.command(*flags), env=env)

    def each_drafts(self) -> bool:
        """Ask both engines; whether both have drafted."""
        with ThreadPoolExecutor(4) as clients:
            list(clients.map(lambda _: greedy(self, PROMPTS[0], TOKENS), range(4)))
        drafted = self.by_label("vllm:qwen3next_draft_length_sum", "engine")
        return set(drafted) == {"0", "1"} and min(drafted.values()) > 0


@pytest.mark.parametrize("experts", long_except(["shared"], EXPERTS))
def test_two_engines_answer_as_one(reference, experts):
    """One that has nothing to do lets the other go on; at once, each has rows of other lengths."""
    server = Replicas(SHIPPED, *EXPERTS[experts]).wait()
    try:
        answers = [greedy(server, PROMPTS[0], TOKENS)]
        with ThreadPoolExecutor(6) as clients:
            answers += clients.map(lambda ids: greedy(server, ids, TOKENS), PROMPTS * 2)
        assert eventually(server.each_drafts)
    finally:
        server.close()
    check_greedy(reference(SHIPPED), [PROMPTS[0], *PROMPTS * 2], answers)


@pytest.mark.long
def test_two_engines_of_a_dense_model(tmp_path, reference):
    model = FAMILY["dense_HV=3H_wrapped_7-layers"].write(tmp_path)
    server = Replicas(model, "--language-model-only").wait()
    asked = [random_prompt(n, seed=12) for n in (1, 130)] * 2
    try:
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(lambda ids: greedy(server, ids, 10), asked))
        assert set(server.by_label("vllm:qwen3next_steps_total", "engine")) == {"0", "1"}
    finally:
        server.close()
    check_greedy(reference(model), asked, answers)
