"""Our loop of `generate`: draft, run the trunk on the draft, keep what is right."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.engines.transformers.speculation.answers import Answers, Output
from qwen3next_plugin.engines.transformers.speculation.drafter import Drafter
from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.steps import Step, StepBuilder
from qwen3next_plugin.mtp.loop import Loop, room
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
            room=lambda _, computed: room(answers.ids.shape[1], computed),
            must_run=True,  # a pass reads as many tokens of each row
            after_prompts=True,  # all of an answer is waited for
        )
        self.steps = StepBuilder(positions, padding, additive=additive)
        self.cache = RowCache(config.layer_types, num_drafts=num_drafts)
        self.drafter = Drafter(model, self.steps, self.cache)

    def run(self) -> Output:
        """Answer all prompts."""
        answers = self.answers
        step = self.steps.prompt()
        hidden = self._trunk(answers.ids[:, : step.end], step)
        counts = [step.end] * len(hidden)
        answers.extend(self.model.lm_head(hidden[:, -1:]), [[]] * len(hidden))
        while not answers.finished:
            starts = [length - 1 for length in answers.lengths]
            tokens = self._drafted(hidden, step, counts)  # [B, n]
            step = self.steps.build(starts, tokens.shape[1])
            hidden = self._trunk(tokens, step)
            counts = answers.extend(self.model.lm_head(hidden), tokens[:, 1:].tolist())
        return answers.result()

    def _drafted(self, hidden: Tensor, step: Step, counts: list[int]) -> Tensor:
        """Each row's last token and its drafts. Shapes: hidden [B, n, D]; counts [B]"""
        ids = self.answers.ids
        last = torch.tensor(self.answers.lengths, device=ids.device)[:, None] - 1
        tokens = ids.gather(1, last)  # [B, 1]
        behind = ids.gather(1, (step.columns + 1).clamp(max=ids.shape[1] - 1))
        num_drafts = self._num_drafts(behind, hidden, step, counts) if self.drafts else 0
        if not num_drafts:
            return tokens
        found = self.drafter.draft(
            tokens=behind,
            hidden=hidden,
            step=step,
            counts=torch.tensor(counts, device=hidden.device),
            num_drafts=num_drafts,
        )
        return torch.cat([tokens, found.to(tokens.device)], dim=1)

    def _num_drafts(self, behind: Tensor, hidden: Tensor, step: Step, counts: list[int]) -> int:
        """How many tokens to draft now, for the row that can use most of them."""
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
            hidden_states=hidden.flatten(0, 1),
        )
        fed = self.loop.step(finished, set(requests), None)
        return max((row.draft for row in fed), default=0)

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
