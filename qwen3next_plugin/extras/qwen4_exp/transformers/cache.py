"""What Qwen4-Exp's layers keep beside the family's: keys of the indexer, inputs of n-grams."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.engines.transformers.state.cache import KeyValueLayer, PageLayer, RowCache
from qwen3next_plugin.engines.transformers.state.steps import BatchStep


def on_axes(step: BatchStep) -> Tensor | None:
    """The positions of all columns, for each axis of RoPE. Shapes: returns [3, B, end]"""
    return None if step.so_far is None else step.so_far.expand(3, -1, -1)


class IndexedLayer(KeyValueLayer):
    """Attention with an indexer, whose keys are kept by column, too."""

    index_keys: Tensor | None = None

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store the step's keys of the indexer; returns those of all columns up to its end.

        Shapes: [B, n, D], returns [B, step.end, D]
        """
        new = indexer_key_states[:, None]  # [B, 1, n, D]
        stored = new[:, :, :0] if self.index_keys is None else self.index_keys
        self.index_keys = self._put(stored, new)
        return self.index_keys[:, 0, : self.step.end]

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Those of all columns, where transformers looks for them from 5.24 on."""
        return on_axes(self.step)

    @indexer_position_ids.setter
    def indexer_position_ids(self, _: Tensor) -> None:
        """The step knows them."""


class NgramPageLayer(PageLayer):
    """Pages, and what the layer's n-grams read of earlier tokens.

    That is `conv_states` of other indices than 0.
    """

    def __init__(self, num_drafts: int) -> None:
        super().__init__(num_drafts, number_of_states=3)
        self.recent: dict[int, Tensor] = {}  # what each of `conv_states` goes back in

    def begin(self, step: BatchStep) -> None:
        """Drop what rejected drafts of the last step left in `conv_states`."""
        for index, recent in self.recent.items():
            dropped = self.step.columns[:, -1:] + 1 - step.columns[:, :1]  # [B, 1]
            width = self.conv_kernel_size[index]
            every = torch.arange(width, device=recent.device)
            at = recent.shape[-1] - width - dropped.to(recent.device) + every  # [B, width]
            at = at.view(len(at), *[1] * (recent.ndim - 2), width)
            self.conv_states[index] = recent.gather(-1, at.expand(*recent.shape[:-1], width))
        self.step = step

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: Any = None, **_: Any
    ) -> Tensor:
        """Keep what the next step may read; returns this step's behind what it reads.

        Shapes: conv_states [B, …, n], returns [B, …, conv_kernel_size + n]
        """
        before = self.conv_states[state_idx]
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:-1], conv_kernel_size)
        found = torch.cat([before, conv_states], dim=-1)
        self.recent[state_idx] = found[..., -(conv_kernel_size + self.num_drafts + 1) :].clone()
        self.conv_kernel_size[state_idx] = conv_kernel_size
        self.has_previous_state[state_idx] = True
        return found


class StreamsCache(RowCache):
    """The cache of a model with both."""

    linear = NgramPageLayer
    attention = IndexedLayer

    @property
    def position_ids(self) -> Tensor | None:
        """Those of all columns, where transformers before 5.24 looks for them."""
        return on_axes(self.step)

    @position_ids.setter
    def position_ids(self, _: Tensor) -> None:
        """The step knows them."""
