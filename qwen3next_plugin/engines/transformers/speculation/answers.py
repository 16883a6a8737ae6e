"""The answers of a batch: the host's rules choose each token; drafts that equal it are kept.

Every token is chosen as the host's plain loop does: its logits processors see the row's tokens so
far, then the likeliest or a sample of the distribution is taken. A draft is kept while it equals
the token. So the distribution is the model's: a draft d is accepted with probability p(d), and
otherwise the token comes from the rest of p. That is rejection sampling for a greedy drafter.
"""

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers.generation import (
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
)

Output: TypeAlias = GenerateDecoderOnlyOutput | Tensor


class Answers:
    """Tokens, length and end of each row of a batch."""

    def __init__(
        self,
        input_ids: Tensor,
        *,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: Any,
        streamer: Any,
    ) -> None:
        """Shapes: input_ids [B, T]"""
        (B, T), self.config = input_ids.shape, config
        self.processors, self.criteria, self.streamer = processors, criteria, streamer
        # Without a criterion for the end token, the host extends every row until the last one ends.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        pad = config._pad_token_tensor
        most = criteria.max_length or config.max_length  # the host's criterion, or the caller's
        self.ids = input_ids.new_full((B, max(most, T + 1)), 0 if pad is None else pad)
        self.ids[:, :T] = input_ids
        self.begins, self.lengths = T, [T] * B
        self.ends: list[int | None] = [None] * B
        self.streamed = T
        # [B, V] of each step, zeros after a row's end
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    @property
    def finished(self) -> bool:
        return not any(map(self.runs, range(len(self.ends))))

    def runs(self, row: int) -> bool:
        """Whether the row gets further tokens."""
        if self.ends[row] is None:
            return True
        open_rows = None in self.ends
        behind = open_rows or self.lengths[row] < self.longest
        return not self.pads and behind and self.room(row) > 0

    def room(self, row: int) -> int:
        """How many tokens the row may still get."""
        return self.ids.shape[1] - self.lengths[row]

    @property
    def longest(self) -> int:
        """The length of the result so far."""
        return max(end or length for end, length in zip(self.ends, self.lengths, strict=True))

    def extend(self, logits: Tensor, drafts: list[list[int]]) -> list[int]:
        """Add each running row's tokens; returns how many of the step's tokens each row keeps.

        Shapes: logits [B, n, V]; drafts [B][n-1]; the counts are from 1 to n
        """
        greedy = None
        if not (self.processors or self.config.do_sample or self.config.return_dict_in_generate):
            greedy = logits.argmax(-1).tolist()
        counts = [1] * len(drafts)
        rows = [row for row in range(len(drafts)) if self.runs(row)]
        for i in range(logits.shape[1]):
            if greedy:
                tokens = [greedy[row][i] for row in rows]
            else:
                tokens = self._choose(rows, logits[:, i])
            self._append(rows, tokens)
            for row in rows:
                counts[row] = i + 1
            rows = [
                row
                for row, token in zip(rows, tokens, strict=True)
                if self.runs(row) and token == (*drafts[row], None)[i]
            ]
            if not rows:
                break
        self._stream()
        return counts

    def _choose(self, rows: list[int], logits: Tensor) -> list[int]:
        """The next token of these rows. Shapes: logits [B, V], of all rows"""
        logits = logits.to(torch.float32, copy=True)
        scores = torch.empty_like(logits)
        for same, length in self._by_length(rows):
            scores[same] = self.processors(self.ids[:, :length], logits.clone())[same]
        for wanted, steps, found in (
            (self.config.output_scores, self.scores, scores),
            (self.config.output_logits, self.logits, logits),
        ):
            for row in rows if wanted else ():
                step = self.lengths[row] - self.begins
                if step == len(steps):
                    steps.append(torch.zeros_like(found))
                steps[step][row] = found[row]
        if self.config.do_sample:
            return torch.multinomial(scores[rows].softmax(-1), num_samples=1)[:, 0].tolist()
        return scores[rows].argmax(-1).tolist()

    def _append(self, rows: list[int], tokens: list[int]) -> None:
        for row, token in zip(rows, tokens, strict=True):
            self.ids[row, self.lengths[row]] = token
            self.lengths[row] += 1
        for same, length in self._by_length([row for row in rows if self.ends[row] is None]):
            scores = self._steps(self.scores, length)
            ended = self.criteria(self.ids[:, :length], scores).tolist()
            for row in same:
                self.ends[row] = length if ended[row] else None

    def _by_length(self, rows: list[int]) -> Iterator[tuple[list[int], int]]:
        """Group rows by length, because the host's rules expect a batch of equal lengths."""
        for length in {self.lengths[row] for row in rows}:
            yield [row for row in rows if self.lengths[row] == length], length

    def _stream(self) -> None:
        """Stream the columns that all rows have reached."""
        if self.streamer is None:
            return
        reached = [
            self.longest if not self.runs(row) else length
            for row, length in enumerate(self.lengths)
        ]
        while self.streamed < min(*reached, self.longest):
            self.streamer.put(self.ids[:, self.streamed].cpu())
            self.streamed += 1

    def result(self) -> Output:
        """What the host's `generate` returns."""
        if self.streamer is not None:
            self.streamer.end()
        ids = self.ids[:, : self.longest]
        if not self.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=self._steps(self.scores, self.longest),
            logits=self._steps(self.logits, self.longest),
        )

    def _steps(self, steps: list[Tensor], length: int) -> tuple[Tensor, ...] | None:
        """The entries up to this row length; None if entries are not kept."""
        return tuple(steps[: length - self.begins]) or None
