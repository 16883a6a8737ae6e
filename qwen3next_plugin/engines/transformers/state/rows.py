"""A step's tokens without padding, row behind row, as the neutral layers take them."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from qwen3next_plugin.kernels import step as kernels


@dataclass(frozen=True, slots=True)
class Rows:
    """The tokens of a step. A row's number is its slot.

    Shapes: row, positions [T], of each token; seq_lens [N], the step's tokens included
    """

    step: kernels.Step
    row: Tensor
    positions: Tensor
    seq_lens: Tensor
    longest: int  # of seq_lens

    @classmethod
    def of(cls, lengths: Tensor, contexts: Tensor) -> Self:
        """Rows of these lengths, each after its number of context tokens. Shapes: [N] each"""
        number = torch.arange(len(lengths), dtype=torch.int32)
        ends, row = lengths.cumsum(0), number.repeat_interleave(lengths)
        T, seq_lens = len(row), contexts + lengths
        starts = torch.cat([ends.new_zeros(1), ends])
        step = kernels.Step(starts.int(), number, contexts.int(), T, int(lengths.max()))
        positions = torch.arange(T) + (contexts - starts[:-1])[row]
        return cls(step, row, positions, seq_lens, int(seq_lens.max()))

    @classmethod
    def of_step(cls, step: kernels.Step) -> tuple[Tensor, Self]:
        """A step's rows without padding (rows without a page), and a mask of their tokens.

        Shapes: returns [step.num_tokens] bool
        """
        lengths, is_row = step.query_start_loc.diff(), step.slot != kernels.NULL_SLOT
        return is_row.repeat_interleave(lengths), cls.of(lengths[is_row], step.context_len[is_row])

    @classmethod
    def of_batch(cls, is_token: Tensor, positions: Tensor | None) -> tuple[Tensor, Self]:
        """Rows of whole texts, and a mask of their tokens; position 0 begins another text.

        Shapes: is_token, positions [B, T], returns is_token [B·T]

        Raises: ValueError: positions that do not count up from 0.
        """
        if positions is None:
            positions = is_token.cumsum(1) - 1
        found = positions[is_token]
        starts = (found == 0).nonzero()[:, 0]
        lengths = torch.cat([starts, starts.new_tensor([len(found)])]).diff()
        if len(starts):
            rows = cls.of(lengths, torch.zeros_like(lengths))
            if torch.equal(rows.positions, found):
                return is_token.flatten(), rows
        raise ValueError(
            "QWEN3NEXT_BATCH_INVARIANT=1: the position_ids of each text count up from 0; leave "
            "them out"
        )
