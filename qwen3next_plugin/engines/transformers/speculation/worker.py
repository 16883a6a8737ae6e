"""Our loop of `generate`: draft, run the trunk on the draft, keep what is right."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.engines.transformers.speculation.answers import Answers, Output
from qwen3next_plugin.engines.transformers.speculation.drafter import Drafter
from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.steps import BatchStep, StepBuilder
from qwen3next_plugin.mtp.loop import Loop, usable_drafts
from qwen3next_plugin.mtp.metrics import Observer
from qwen3next_plugin.mtp.policy import Fixed
from qwen3next_plugin.mtp.rows import FinishedStep


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
        self.model, self.answers = model, answers
        self.drafts = num_drafts > 0
        self.loop = Loop(
            observer=Observer(Fixed(num_drafts)),
            usable_drafts=lambda _, computed: usable_drafts(answers.ids.shape[1], computed),
            must_run=True,  # a pass reads the same number of tokens in each row
            after_prompts=True,  # callers wait for whole answers
        )
        indexed = "indexed_attention" in config.layer_types
        self.steps = StepBuilder(positions, padding, additive=additive, indexed=indexed)
        self.cache: RowCache = model.cache_class(config.layer_types, num_drafts=num_drafts)
        self.drafter = Drafter(model, self.steps, self.cache)

    def run(self) -> Output:
        """Answer all prompts."""
        answers = self.answers
        step = self.steps.prompt()
        hidden, fed = self._trunk(answers.ids[:, : step.end], step)
        counts = [step.end] * len(hidden)
        answers.extend(self.model.lm_head(hidden[:, -1:]), [[]] * len(hidden))
        while not answers.finished:
            starts = [length - 1 for length in answers.lengths]
            tokens = self._drafted(fed, step, counts)  # [B, n]
            step = self.steps.build(starts, tokens.shape[1])
            hidden, fed = self._trunk(tokens, step)
            counts = answers.extend(self.model.lm_head(hidden), tokens[:, 1:].tolist())
        return answers.result()

    def _drafted(self, fed: Tensor, step: BatchStep, counts: list[int]) -> Tensor:
        """Each row's last token and its drafts. Shapes: fed [B, n, …]; counts [B]"""
        ids = self.answers.ids
        last = torch.tensor(self.answers.lengths, device=ids.device)[:, None] - 1
        tokens = ids.gather(1, last)  # [B, 1]
        behind = ids.gather(1, (step.columns + 1).clamp(max=ids.shape[1] - 1))
        num_drafts = self._num_drafts(behind, fed, step, counts) if self.drafts else 0
        if not num_drafts:
            return tokens
        found = self.drafter.draft(
            tokens=behind,
            fed=fed,
            step=step,
            counts=torch.tensor(counts, device=fed.device),
            num_drafts=num_drafts,
        )
        return torch.cat([tokens, found.to(tokens.device)], dim=1)

    def _num_drafts(self, behind: Tensor, fed: Tensor, step: BatchStep, counts: list[int]) -> int:
        """How many tokens to draft now: the largest number that a row can use."""
        B, n = behind.shape
        running = [row for row in range(B) if self.answers.runs(row)]
        requests = [str(row) for row in running]
        finished = FinishedStep(
            requests=requests,
            starts=[row * n for row in running],
            firsts=step.columns[running, 0].tolist(),
            scheduled=[n] * len(running),
            counts=[counts[row] for row in running],
            prefilling=[False] * len(running),
            continues=[bool(self.loop.ends)] * len(running),  # the first step reads the prompts
            token_ids=behind.flatten(),
            hidden_states=fed.flatten(0, 1),
        )
        rows = self.loop.step(finished, set(requests), None)
        return max((row.draft for row in rows), default=0)

    def _trunk(self, tokens: Tensor, step: BatchStep) -> tuple[Tensor, Tensor]:
        """Run the trunk; returns the output head's input and the MTP layer's.

        Shapes: tokens [B, n], returns [B, n, D] and [B, n, …]
        """
        self.cache.begin(step)
        masks = dict.fromkeys(("full_attention", "indexed_attention"), step.attend)
        found = self.model.run_trunk(
            input_ids=tokens,
            position_ids=step.positions,
            attention_mask=masks | {"linear_attention": step.is_token},
            use_cache=True,
            **{CACHE: self.cache},
        )
        self.cache.check()
        return found
