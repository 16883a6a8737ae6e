"""`python -m sglang.launch_server` in a process group of its own, on a free port."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engines import server
from engines.checks import Output
from engines.process import Fork, Process
from engines.sglang import launch

NEXTN = ("--speculative-algo", "NEXTN", "--speculative-num-steps")
FIXED = {"QWEN3NEXT_DRAFTS": "fixed"}


@dataclass(frozen=True, kw_only=True)
class Answer(Output):
    """One finished sequence, and what its drafts were good for."""

    steps: int  # verifications
    accepted: int  # drafts
    kept: tuple[int, ...]  # the verifications of which none, one, two … drafts were accepted

    @classmethod
    def of(cls, answer: dict[str, Any], **asked: Any) -> "Answer":
        """From what /generate answers to a request with these fields."""
        meta = answer["meta_info"]
        logprobs = prompt_logprobs = None
        if asked.get("return_logprob"):
            logprobs = _logprobs(meta["output_token_logprobs"])
            if asked.get("logprob_start_len") == 0:
                prompt_logprobs = _logprobs(meta["input_token_logprobs"][1:])
        return cls(
            token_ids=tuple(answer["output_ids"]),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            cached=meta["cached_tokens"],
            finish_reason=meta["finish_reason"]["type"],
            text=answer["text"],
            steps=meta.get("spec_verify_ct", 0),
            accepted=meta.get("spec_num_correct_drafts", 0),
            kept=tuple(meta.get("spec_correct_drafts_histogram", ())),
        )


def _logprobs(entries: Sequence[tuple[float, int, str | None]]) -> tuple[float, ...]:
    return tuple(logprob for logprob, _, _ in entries)


class Server(server.Server):
    """A real SGLang server."""

    HEALTH = "/ready"
    END = signal.SIGKILL  # for SIGTERM it looks every five seconds only

    def command(self, *flags: str) -> list[str]:
        return [sys.executable, "-m", "sglang.launch_server", *self.arguments(*flags)]

    def arguments(self, *flags: str) -> list[str]:
        return ["--model-path", self.model, "--host", self.host, "--port", str(self.port), *flags]

    def environment(self) -> dict[str, str]:
        """One thread: at these sizes more only cost time."""
        return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

    def greedy(
        self, prompts: Sequence[tuple[int, ...]], tokens: int, **options: Any
    ) -> list[Answer]:
        """Run all prompts at once through /generate, greedily; `options` are its own."""
        params = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        answers = self.post(
            "/generate", input_ids=[list(ids) for ids in prompts], sampling_params=params, **options
        )
        return [Answer.of(answer, **options) for answer in answers]

    def unfinished(self) -> int:
        """The number of requests that run or wait."""
        load = self.load()
        return load["num_running_reqs"] + load["num_waiting_reqs"]

    def load(self) -> dict[str, Any]:
        """What SGLang says of its requests."""
        (load,) = json.loads(self.get("/v1/loads"))["loads"]
        return load

    def forget(self) -> None:
        """Empty the radix cache."""
        self.get("/flush_cache?timeout=50")  # seconds; raises where requests still run


class Forked(Server):
    """A server whose processes are forks, the first of one that has SGLang loaded: see launch.py.

    It serves without having asked itself anything, for which it would wait a second.
    """

    def start(self, env: dict[str, str], *flags: str) -> Process:
        Fork.preload(["engines.sglang.loaded"], self.environment())
        return Fork(launch.forked, *self.arguments("--skip-server-warmup", *flags), env=env)
