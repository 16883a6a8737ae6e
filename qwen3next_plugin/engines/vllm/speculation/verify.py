"""Verification of drafts by vLLM's plain sampler: the same text with drafts as without.

Every position of a step, a request's drafts and the one after them, is a row of logits. The plain
sampler samples each row as if it stood alone: the request's own parameters, the drafts before it
counted as output, the next draw of the request's generator. A draft is kept while it equals its
row's sample; the first sample that differs is the step's last token. So

- every token is the plain sampler's: the distribution is the model's own whatever the drafts are,
  and a draft x is kept with probability p(x), as often as rejection sampling keeps greedy drafts;
- generators go back to where the last token left them: a seed gives the text it gives without
  drafts, however many were made (where logits agree to the last bit that matters).

vLLM's own RejectionSampler draws other noise, in other amounts. In 0.32 it also lets min_tokens
forbid the end for up to k tokens too long, knows neither min_p nor logit_bias, and on a CPU
divides by temperatures that it never wrote.
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

NO_TOKEN = -1  # what vLLM takes for a position that yields none


class CoupledSampler:
    """Stands in the model runner where vLLM's RejectionSampler stood."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Sample all positions and keep each request's up to the first that is not its draft.

        Shapes: logits [T, vocab]; returns token ids [N, longest draft + 1]
        """
        holder = sampling_metadata.thinking_budget_state_holder
        if not any(metadata.num_draft_tokens):
            if holder is not None:
                sampling_metadata = replace(
                    sampling_metadata, thinking_budget_state_holder=by_row(holder)
                )
            return self.sampler(logits, sampling_metadata)
        rows = Rows.of(metadata)
        noise = Noise(rows, sampling_metadata.generators)
        budgets = None if holder is None else ThinkingBudgets(holder, rows)
        output = self.sampler(logits, spread(sampling_metadata, rows, noise, budgets))
        tokens = rows.kept(output.sampled_token_ids[:, 0].tolist())
        used = [len(part) for part in tokens]
        noise.rewind(used)
        if budgets is not None:
            budgets.rewind(used)
        width = max(rows.counts)
        padded = [part + [NO_TOKEN] * (width - len(part)) for part in tokens]
        return SamplerOutput(
            sampled_token_ids=output.sampled_token_ids.new_tensor(padded),
            logprobs_tensors=_at(output.logprobs_tensors, rows),
        )


def _at(logprobs: LogprobsTensors | None, rows: "Rows") -> LogprobsTensors | None:
    """Those of each position; vLLM drops those of positions that yield no token."""
    if logprobs is None:
        return None
    table = rows.table().flatten()
    return LogprobsTensors(
        logprobs.logprob_token_ids[table],
        logprobs.logprobs[table],
        logprobs.selected_token_ranks[table],
    )


@dataclass(frozen=True)
class Rows:
    """Where the rows of logits belong: T rows of N requests, in the requests' order."""

    counts: list[int]  # rows of each request: one per draft, and one
    drafts: list[list[int]]
    device: torch.device

    @classmethod
    def of(cls, metadata: SpecDecodeMetadata) -> "Rows":
        ids, ends = metadata.draft_token_ids, [*accumulate(metadata.num_draft_tokens)]
        flat = ids.tolist()
        drafts = [flat[begin:end] for begin, end in pairwise([0, *ends])]
        return cls([len(part) + 1 for part in drafts], drafts, ids.device)

    @cached_property
    def request(self) -> torch.Tensor:
        """Whose row it is: [T]."""
        request = torch.arange(len(self.counts)).repeat_interleave(torch.tensor(self.counts))
        return request.to(self.device)

    def starts(self) -> list[int]:
        """Each request's first row."""
        return [0, *accumulate(self.counts[:-1])]

    def kept(self, sampled: list[int]) -> list[list[int]]:
        """Each request's sampled tokens, up to the first that is not its draft."""
        kept = []
        for start, drafts in zip(self.starts(), self.drafts, strict=True):
            pairs = enumerate(drafts)
            right = next((j for j, draft in pairs if sampled[start + j] != draft), len(drafts))
            kept.append(sampled[start : start + right + 1])
        return kept

    def table(self) -> torch.Tensor:
        """Each request's rows [N, K+1]; its last is repeated where it has fewer."""
        last = torch.tensor(self.counts) - 1
        column = torch.arange(max(self.counts))
        table = torch.tensor(self.starts())[:, None] + column.minimum(last[:, None])
        return table.to(self.device)

    def each(self) -> list[tuple[int, int]]:
        """(request, offset) of every row."""
        return [(i, j) for i, count in enumerate(self.counts) for j in range(count)]


class Noise(Mapping[int, torch.Generator]):
    """The generator of every seeded row, which vLLM takes from here row after row.

    A request's rows share its generator, so each draws what the plain sampler would have drawn
    there. The state in front of each draw is kept, to go back to.
    """

    def __init__(self, rows: Rows, generators: Mapping[int, torch.Generator]) -> None:
        self.starts, self.counts = rows.starts(), rows.counts
        self.of_request = generators
        self.of_row = {
            row: generators[i]
            for i in sorted(generators)
            for row in range(self.starts[i], self.starts[i] + self.counts[i])
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
        """Undo the draws beyond each request's first `used`."""
        for i, generator in self.of_request.items():
            state = self.before.get(self.starts[i] + used[i])
            if used[i] < self.counts[i] and state is not None:
                generator.set_state(state)


def spread(
    metadata: SamplingMetadata, rows: Rows, noise: Noise, budgets: "ThinkingBudgets | None"
) -> SamplingMetadata:
    """What vLLM knows of N requests as what it would know of T, one for each row."""

    def spread_tensor(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows.request]

    def spread_dict(values: Mapping[int, Any]) -> dict[int, Any]:
        each = enumerate(rows.each())
        return {row: values[i] for row, (i, _) in each if i in values} if values else {}

    outputs = metadata.output_token_ids  # empty where nothing asks for them
    penalties = {
        name: spread_tensor(getattr(metadata, name))
        for name in (
            "prompt_token_ids",
            "frequency_penalties",
            "presence_penalties",
            "repetition_penalties",
        )
    }
    return replace(
        metadata,
        temperature=spread_tensor(metadata.temperature),
        top_p=spread_tensor(metadata.top_p),
        top_k=spread_tensor(metadata.top_k),
        generators=noise,
        output_token_ids=[[*outputs[i], *rows.drafts[i][:j]] for i, j in rows.each()]
        if outputs
        else [],
        spec_token_ids=None,
        allowed_token_ids_mask=spread_tensor(metadata.allowed_token_ids_mask),
        bad_words_token_ids=spread_dict(metadata.bad_words_token_ids),
        logprob_token_ids=spread_dict(metadata.logprob_token_ids or {}) or None,
        logitsprocs=spread_processors(metadata.logitsprocs, rows),
        thinking_budget_state_holder=budgets,
        **({} if metadata.no_penalties else penalties),
    )


def spread_processors(processors: LogitsProcessors, rows: Rows) -> LogitsProcessors:
    """The same processors in the same order, each applied to rows."""
    spread = LogitsProcessors()
    spread.argmax_invariant = [Spread(p, rows) for p in processors.argmax_invariant]
    spread.non_argmax_invariant = [Spread(p, rows) for p in processors.non_argmax_invariant]
    return spread


class Spread:
    """One of vLLM's processors, which knows of requests, applied to rows."""

    def __init__(self, processor: Any, rows: Rows) -> None:
        self.apply_to_rows = APPLY[type(processor)]
        self.processor, self.rows = processor, rows

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.apply_to_rows(self.processor, logits, self.rows)


def _min_tokens(
    processor: MinTokensLogitsProcessor, logits: torch.Tensor, rows: Rows
) -> torch.Tensor:
    return processor.apply_with_spec_decode(logits, rows.counts)


def _min_p(processor: MinPLogitsProcessor, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    if not processor.min_p_count:
        return logits
    spread = copy(processor)
    spread.min_p = processor.min_p[rows.request]  # [T, 1]
    return spread.apply(logits)


def _logit_bias(
    processor: LogitBiasLogitsProcessor, logits: torch.Tensor, rows: Rows
) -> torch.Tensor:
    of_request = logits.split(rows.counts)
    for i, bias in processor.biases.items():
        of_request[i][:, list(bias)] += logits.new_tensor(list(bias.values()))
    return logits


APPLY = {
    MinTokensLogitsProcessor: _min_tokens,
    MinPLogitsProcessor: _min_p,
    LogitBiasLogitsProcessor: _logit_bias,
}


def by_row(holder: Any) -> Any:
    """vLLM's thinking budgets as without drafts: row i is request i's; the states are shared."""
    alike = copy(holder)
    alike.in_spec_mode = False
    alike.cu_num_tokens = {}
    return alike


class ThinkingBudgets:
    """vLLM's thinking budgets, applied row after row as they are step after step without drafts.

    vLLM's holder knows drafts in its own way: where a budget ends depends on how many there are,
    and where a step has none it takes every request's row for the first.
    """

    def __init__(self, holder: Any, rows: Rows) -> None:
        self.holder = holder
        self.starts, self.counts = rows.starts(), rows.counts
        self.of_row = by_row(holder)

    def has_tracked_requests(self) -> bool:
        return self.holder.has_tracked_requests()

    def update_state(self, outputs: list[list[int]], *_: Any, **__: Any) -> None:
        """Each row's state is that of the row before it, a token later."""
        states: dict[int, dict[str, Any]] = {}
        of_request = dict(self.holder._state)
        for offset in range(max(self.counts)):
            going_on = [i for i in of_request if offset < self.counts[i]]
            self.of_row._state = {self.starts[i] + offset: {**of_request[i]} for i in going_on}
            self.of_row.update_state(outputs, None)
            states |= self.of_row._state
            of_request = {i: states[self.starts[i] + offset] for i in going_on}
        self.of_row._state = states

    def apply_to_logits(self, logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return self.of_row.apply_to_logits(logits, False, None)

    def rewind(self, used: list[int]) -> None:
        """Keep the state that each request's last token left."""
        states = self.of_row._state
        for i in self.holder._state:
            self.holder._state[i] = states[self.starts[i] + used[i] - 1]
