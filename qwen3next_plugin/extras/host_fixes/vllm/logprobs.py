"""Steps that mix log-probabilities of chosen tokens and of the likeliest tokens."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.functional import pad
from vllm.v1.outputs import LogprobsTensors

from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.vllm.patches import When, patch


@patch(
    When.IN_WORKER,
    "vllm.v1.worker.cpu_worker.CPUWorker.init_device",
    reason="a new runner's sampler gets `gather_both`",
    remove_when="`gather_both` is removed",
)
def begin_to_gather_both(host: Callable[[Any], None], worker: Any) -> None:
    """Around `CPUWorker.init_device`, which makes the runner."""
    host(worker)
    runner = worker.model_runner
    runner.sampler.gather_specific_token_logprobs = gather_both(runner)


@override(
    "vllm.v1.sample.sampler.Sampler.gather_specific_token_logprobs",
    reason="a request for the log-probabilities of chosen tokens replaces the likeliest tokens "
    "of all other requests of its step",
    remove_when="vLLM gathers both (`compat`)",
    upstream="https://github.com/vllm-project/vllm/pull/51789",
)
def gather_both(runner: Any) -> Callable[..., LogprobsTensors | None]:
    """Override `gather_specific_token_logprobs`: keep the likeliest tokens of other rows.

    vLLM gathers both if a step has requests of both kinds, but returns the chosen ones only: then
    other requests get token 0 in place of their likeliest.
    """
    sampler = runner.sampler
    host = sampler.gather_specific_token_logprobs

    def gather(
        logprobs: torch.Tensor, logprob_token_ids: Mapping[int, list[int]], sampled: torch.Tensor
    ) -> LogprobsTensors | None:
        chosen: LogprobsTensors | None = host(logprobs, logprob_token_ids, sampled)
        most = runner.input_batch.max_num_logprobs  # -1: all
        if chosen is None or most is None:
            return chosen
        most = logprobs.shape[1] if most == -1 else most
        likeliest = sampler.gather_logprobs(logprobs, most, token_ids=sampled)
        rows = torch.zeros(len(sampled), 1, dtype=torch.bool)
        rows[list(logprob_token_ids)] = True
        width = max(chosen.logprobs.shape[1], likeliest.logprobs.shape[1])

        def beside(of_chosen: torch.Tensor, others: torch.Tensor, none: float) -> torch.Tensor:
            left, right = (pad(x, (0, width - x.shape[1]), value=none) for x in (of_chosen, others))
            return torch.where(rows, left, right)

        return LogprobsTensors(
            beside(chosen.logprob_token_ids, likeliest.logprob_token_ids, 0),
            beside(chosen.logprobs, likeliest.logprobs, float("-inf")),
            chosen.selected_token_ranks,
        )

    return gather
