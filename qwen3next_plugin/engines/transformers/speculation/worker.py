"""The loop of `generate(use_mtp=True)`: draft, run the trunk on the draft, keep what is right."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.engines.transformers.speculation.answers import Answers, Output
from qwen3next_plugin.engines.transformers.speculation.drafter import Drafter
from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.steps import Step, StepBuilder


class Worker:
    """One call of `generate`."""

    def __init__(
        self,
        model: Any,
        answers: Answers,
        *,
        positions: Tensor,
        padding: list[int],
        num_drafts: int,
    ) -> None:
        """`padding` is each prompt's number of columns before its first token.

        Shapes: positions [B, T] of the prompts
        """
        config = model.config
        additive = model.dtype if config._attn_implementation == "eager" else None
        self.model, self.answers, self.num_drafts = model, answers, num_drafts
        self.steps = StepBuilder(positions, padding, additive=additive)
        self.cache = RowCache(config.layer_types, num_drafts=num_drafts)
        self.drafter = Drafter(model, self.steps, self.cache)

    def run(self) -> Output:
        """Answer all prompts."""
        answers = self.answers
        step = self.steps.prompt()
        hidden = self._trunk(answers.ids[:, : step.end], step)
        counts = torch.full((len(hidden),), step.end, device=hidden.device)
        answers.extend(self.model.lm_head(hidden[:, -1:]), [[]] * len(hidden))
        while not answers.finished:
            starts = [length - 1 for length in answers.lengths]
            tokens = self._drafted(hidden, step, counts)  # [B, n]
            step = self.steps.build(starts, tokens.shape[1])
            hidden = self._trunk(tokens, step)
            kept = answers.extend(self.model.lm_head(hidden), tokens[:, 1:].tolist())
            counts = torch.tensor(kept, device=hidden.device)
        return answers.result()

    def _drafted(self, hidden: Tensor, step: Step, counts: Tensor) -> Tensor:
        """Each row's last token and its drafts. Shapes: hidden [B, n, D]; counts [B]"""
        answers = self.answers
        running = filter(answers.runs, range(len(answers.lengths)))
        num_drafts = min(self.num_drafts, max(map(answers.room, running)) - 1)
        last = torch.tensor(answers.lengths, device=answers.ids.device)[:, None] - 1
        tokens = answers.ids.gather(1, last)  # [B, 1]
        if num_drafts <= 0:
            return tokens
        behind = (step.columns + 1).clamp(max=answers.ids.shape[1] - 1)
        found = self.drafter.draft(
            tokens=answers.ids.gather(1, behind),
            hidden=hidden,
            step=step,
            counts=counts,
            num_drafts=num_drafts,
        )
        return torch.cat([tokens, found.to(tokens.device)], dim=1)

    def _trunk(self, tokens: Tensor, step: Step) -> Tensor:
        """The trunk's hidden states. Shapes: tokens [B, n], returns [B, n, D]"""
        self.cache.begin(step)
        masks = {"full_attention": step.attend, "linear_attention": None}
        outputs = self.model.model(
            input_ids=tokens,
            position_ids=step.positions,
            attention_mask=masks,
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.cache.check()
        return outputs.last_hidden_state
