"""vLLM's sampling metadata and logits processors of N requests, spread over T rows of logits."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata

from qwen3next_plugin.engines.vllm.speculation.logit_rows import LogitRows
from qwen3next_plugin.engines.vllm.speculation.thinking_budgets import ThinkingBudgets

PENALTIES = (
    "prompt_token_ids",
    "frequency_penalties",
    "presence_penalties",
    "repetition_penalties",
)


def spread(
    metadata: SamplingMetadata,
    rows: LogitRows,
    generators: Mapping[int, torch.Generator],
    budgets: ThinkingBudgets | None,
) -> SamplingMetadata:
    """The metadata that vLLM's sampler would have if each row were a request."""

    def tensor(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[rows.request]

    def mapping(values: Mapping[int, Any]) -> dict[int, Any]:
        each = enumerate(rows.positions)
        return {row: values[i] for row, (i, _) in each if i in values} if values else {}

    outputs = metadata.output_token_ids  # empty when nothing needs them
    penalties = {name: tensor(getattr(metadata, name)) for name in PENALTIES}
    return replace(
        metadata,
        temperature=tensor(metadata.temperature),
        top_p=tensor(metadata.top_p),
        top_k=tensor(metadata.top_k),
        generators=generators,
        output_token_ids=[[*outputs[i], *rows.drafts[i][:j]] for i, j in rows.positions]
        if outputs
        else [],
        spec_token_ids=None,
        allowed_token_ids_mask=tensor(metadata.allowed_token_ids_mask),
        bad_words_token_ids=mapping(metadata.bad_words_token_ids),
        logprob_token_ids=mapping(metadata.logprob_token_ids or {}) or None,
        logitsprocs=_spread_processors(metadata.logitsprocs, rows),
        thinking_budget_state_holder=budgets,
        **({} if metadata.no_penalties else penalties),
    )


def _spread_processors(processors: LogitsProcessors, rows: LogitRows) -> LogitsProcessors:
    """The same processors in the same order, each applied to rows."""
    of_rows = LogitsProcessors()
    of_rows.argmax_invariant = [RowProcessor(p, rows) for p in processors.argmax_invariant]
    of_rows.non_argmax_invariant = [RowProcessor(p, rows) for p in processors.non_argmax_invariant]
    return of_rows


class RowProcessor:
    """One of vLLM's processors, whose parameters are per request, applied to rows."""

    def __init__(self, processor: Any, rows: LogitRows) -> None:
        self.apply_to_rows = APPLY[type(processor)]
        self.processor, self.rows = processor, rows

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return self.apply_to_rows(self.processor, logits, self.rows)


def _min_tokens(
    processor: MinTokensLogitsProcessor, logits: torch.Tensor, rows: LogitRows
) -> torch.Tensor:
    return processor.apply_with_spec_decode(logits, rows.counts)


def _min_p(processor: MinPLogitsProcessor, logits: torch.Tensor, rows: LogitRows) -> torch.Tensor:
    if not processor.min_p_count:
        return logits
    of_rows = copy(processor)
    of_rows.min_p = processor.min_p[rows.request]  # [T, 1]
    return of_rows.apply(logits)


def _logit_bias(
    processor: LogitBiasLogitsProcessor, logits: torch.Tensor, rows: LogitRows
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
