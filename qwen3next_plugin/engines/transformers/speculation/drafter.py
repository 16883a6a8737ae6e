"""Drafts from the MTP layer, which runs once for each draft of a step."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.engines.transformers.state.cache import RowCache
from qwen3next_plugin.engines.transformers.state.steps import BatchStep, StepBuilder
from qwen3next_plugin.mtp.chains import extend


class Drafter:
    """Runs the MTP layer behind the trunk, on the trunk's steps and then on its own drafts."""

    def __init__(self, model: Any, steps: StepBuilder, cache: RowCache) -> None:
        self.model, self.steps, self.cache = model, steps, cache

    def draft(
        self, *, tokens: Tensor, fed: Tensor, step: BatchStep, counts: Tensor, num_drafts: int
    ) -> Tensor:
        """Draft the likeliest tokens after those that a step kept, which the layer reads first.

        Shapes: tokens [B, n] behind each of the step's; fed [B, n, …] what the layer reads of the
            trunk; counts [B], the step's tokens that are right; returns [B, num_drafts]
        """
        rows = torch.arange(len(tokens), device=tokens.device)
        found = self._run(tokens, fed, step)
        hidden, fed = (each[rows, counts - 1][:, None] for each in found)  # [B, 1, …]
        starts = (step.columns[rows, counts - 1] + 1).tolist()

        def run(depth: int, tokens: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
            step = self.steps.build([start + depth - 1 for start in starts], 1)
            hidden, fed = self._run(tokens, fed, step)
            return self._likeliest(hidden), fed

        drafts = extend([num_drafts] * len(tokens), self._likeliest(hidden), fed, run)
        return torch.tensor(drafts, device=tokens.device)

    def _run(self, tokens: Tensor, fed: Tensor, step: BatchStep) -> tuple[Tensor, Tensor]:
        model = self.model
        embeds = model.model.embed_tokens(tokens)
        return model.mtp(
            embeds,
            fed.to(embeds.device),
            rotary=model.model.rotary_emb,
            step=step,
            cache=self.cache,
        )

    def _likeliest(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(hidden).argmax(-1)  # [B, 1]
