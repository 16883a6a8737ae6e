"""Verification of drafts by vLLM's plain sampler: drafts change the speed, not the text.

A request with n drafts has n + 1 rows of logits (`LogitRows`). The plain sampler samples each row
as if it were a step of its own: with the request's parameters, with the drafts before it counted
as output, and with the next draw of the request's generator. A draft is accepted while it equals
the token sampled in its row; the first sampled token that differs is the step's last. Therefore

- every token is a sample of the plain sampler, whatever the drafts are. A draft x is accepted with
  probability p(x), the same rate at which rejection sampling accepts greedy drafts;
- generators are rewound to where the last token left them, so a seed gives the same text with and
  without drafts, as long as the logits are the same.

vLLM's own RejectionSampler draws other random numbers. In 0.32 it also applies min_tokens too long,
by up to a draft, does not support min_p and logit_bias, and on a CPU divides by uninitialised
temperatures.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from qwen3next_plugin.engines.vllm.speculation.logit_rows import LogitRows
from qwen3next_plugin.engines.vllm.speculation.spread import spread
from qwen3next_plugin.engines.vllm.speculation.thinking_budgets import (
    ThinkingBudgets,
    without_drafts,
)

NO_TOKEN = -1  # vLLM's value for a position that yields no token


def drafts_and_rows(runner: Any) -> Callable[..., SpecDecodeMetadata]:
    """Replaces vLLM's method: the drafts, and which tokens have logits, for `CoupledSampler`."""
    none = torch.empty(0, dtype=torch.int32)

    def metadata(
        num_draft_tokens: np.ndarray, cu_num_scheduled_tokens: np.ndarray
    ) -> SpecDecodeMetadata:
        """Shapes: [N] each. A request's rows are its last token and those before it, its drafts."""
        tokens, drafts = cu_num_scheduled_tokens - 1, none
        if num_draft_tokens.any():
            counts = num_draft_tokens + 1
            ends = np.cumsum(counts)
            in_request = np.arange(ends[-1]) - np.repeat(ends - counts, counts)  # [rows]
            tokens = np.repeat(cu_num_scheduled_tokens - counts, counts) + in_request
            drafts = torch.from_numpy(runner.input_ids.np[tokens[in_request > 0]])
        return SpecDecodeMetadata(
            draft_token_ids=drafts,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=none,
            cu_num_sampled_tokens=none,
            target_logits_indices=none,
            bonus_logits_indices=none,
            logits_indices=torch.from_numpy(tokens),
        )

    return metadata


class CoupledSampler:
    """Replaces vLLM's RejectionSampler in the model runner."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Sample all rows; keep each request's tokens up to the first that is not its draft.

        Shapes:
            logits [T, vocab], returns token ids [N, longest draft + 1]
        """
        holder = sampling_metadata.thinking_budget_state_holder
        if not any(metadata.num_draft_tokens):
            if holder is not None and holder.has_tracked_requests():
                sampling_metadata = replace(
                    sampling_metadata, thinking_budget_state_holder=without_drafts(holder)
                )
            return self.sampler(logits, sampling_metadata)
        rows = LogitRows.from_metadata(metadata)
        generators = RowGenerators(rows, sampling_metadata.generators)
        budgets = None if holder is None else ThinkingBudgets(holder, rows)
        output = self.sampler(logits, spread(sampling_metadata, rows, generators, budgets))
        accepted = rows.accept(output.sampled_token_ids[:, 0].tolist())
        used = [len(token_ids) for token_ids in accepted]
        generators.rewind(used)
        if budgets is not None:
            budgets.rewind(used)
        width = max(rows.counts)
        padded = [token_ids + [NO_TOKEN] * (width - len(token_ids)) for token_ids in accepted]
        return SamplerOutput(
            sampled_token_ids=output.sampled_token_ids.new_tensor(padded),
            logprobs_tensors=_padded_logprobs(output.logprobs_tensors, rows),
        )


def _padded_logprobs(logprobs: LogprobsTensors | None, rows: LogitRows) -> LogprobsTensors | None:
    """Log-probabilities padded like the token ids; vLLM drops those without a token."""
    if logprobs is None:
        return None
    index = rows.padded().flatten()
    return LogprobsTensors(
        logprobs.logprob_token_ids[index],
        logprobs.logprobs[index],
        logprobs.selected_token_ranks[index],
    )


class RowGenerators(Mapping[int, torch.Generator]):
    """The generator of each row of a seeded request; vLLM's sampler looks them up in row order.

    The rows of a request share its generator, so each row draws what the plain sampler would have
    drawn at that position. The state before each draw is saved, to rewind to.
    """

    def __init__(self, rows: LogitRows, generators: Mapping[int, torch.Generator]) -> None:
        self.rows, self.of_request = rows, generators
        self.of_row = {
            row: generators[i]
            for i in sorted(generators)
            for row in range(rows.starts[i], rows.starts[i] + rows.counts[i])
        }
        self.before: dict[int, torch.Tensor] = {}

    def __getitem__(self, row: int) -> torch.Generator:
        generator = self.of_row[row]
        self.before[row] = generator.get_state()
        return generator

    def __iter__(self) -> Iterator[int]:
        return iter(self.of_row)

    def __len__(self) -> int:
        return len(self.of_row)

    def rewind(self, used: list[int]) -> None:
        """Undo the draws after each request's first `used`."""
        for i, generator in self.of_request.items():
            state = self.before.get(self.rows.starts[i] + used[i])
            if used[i] < self.rows.counts[i] and state is not None:
                generator.set_state(state)
