"""The cache of a batch with drafts: every row can roll back to any token of its last step.

Rows keep different numbers of drafts, so each has its own length, and its next step says where it
begins. Keys and values are stored by column; a state page rolls back to the context length.
"""

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from qwen3next_plugin import env
from qwen3next_plugin.engines.transformers.state.rows import Rows
from qwen3next_plugin.engines.transformers.state.steps import BatchStep
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.paged_attention import paged_attention
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape
from qwen3next_plugin.model.state import PageLayout
from qwen3next_plugin.versions import installed

# The name of the cache argument of the host's layers and models.
# drop when the minimum is 5.24: it is `cache` from there on
RENAMED = Version("5.24")
CACHE = "past_key_values" if (installed("transformers") or RENAMED) < RENAMED else "cache"
ALIGNMENT = 64  # bytes; a page's size is a multiple
GROWTH = 256  # columns by which the memory for keys and values grows, at least


class KeyValueLayer(DynamicLayer):
    """Keys and values of one attention layer, by column; a rejected draft is overwritten."""

    step: BatchStep  # the one that runs

    def begin(self, step: BatchStep) -> None:
        self.step = step

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        """Store the step's keys and values; returns those of all columns up to its end.

        Shapes: [B, H, n, D], returns twice [B, H, step.end, D]
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.keys = self._put(self.keys, key_states)
        self.values = self._put(self.values, value_states)
        return self.keys[:, :, : self.step.end], self.values[:, :, : self.step.end]

    def _put(self, stored: Tensor, new: Tensor) -> Tensor:
        missing = self.step.end - stored.shape[2]
        if missing > 0:
            B, H, columns, D = stored.shape
            room = max(missing, GROWTH, columns // 4)
            stored = torch.cat([stored, stored.new_zeros(B, H, room, D)], dim=2)
        if self.step.uniform:
            stored[:, :, self.step.end - new.shape[2] : self.step.end] = new
        else:
            at = self.step.columns.to(new.device)
            rows = torch.arange(len(new), device=new.device)[:, None]
            stored[rows, :, at] = new.transpose(1, 2)  # [B, n, H, D]
        return stored


class SequenceLayer(DynamicLayer):
    """Keys and values of one attention layer, by row and position, as `paged_attention` reads them.

    Each row is a page. A rejected draft is overwritten.
    """

    def begin(self, step: BatchStep) -> None:
        """Nothing to do: each pass says where its tokens are."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
        """Store the step's keys and values; each token reads those up to its own.

        Shapes: q [T, Hq, D], k, v [T, Hkv, D], returns as q
        """
        N = len(rows.seq_lens)
        if not self.is_initialized:
            self.lazy_initialization(k, v)
            self.keys = self.values = k.new_empty(N, 0, *k.shape[1:])
        self.keys, self.values = self._put(self.keys, k, rows), self._put(self.values, v, rows)
        number = torch.arange(N, dtype=torch.int32)
        return paged_attention(
            q=q,
            key_cache=self.keys,
            value_cache=self.values,
            token_table=number[:, None],
            table_row=number,
            query_start_loc=rows.step.query_start_loc,
            seq_lens=rows.seq_lens,
            scale=scale,
        )

    def _put(self, stored: Tensor, new: Tensor, rows: Rows) -> Tensor:
        """Shapes: stored and returned [N, columns, Hkv, D], new [T, Hkv, D]"""
        missing = rows.longest - stored.shape[1]
        if missing > 0:
            room = max(missing, GROWTH if stored.shape[1] else 0, stored.shape[1] // 4)
            more = stored.new_empty(len(stored), room, *stored.shape[2:])
            stored = torch.cat([stored, more], dim=1)
        stored[rows.row, rows.positions] = new
        return stored


class PageLayer(LinearAttentionLayer):
    """The state pages of one linear layer; a row's slot is its number."""

    step: BatchStep  # the one that runs

    def __init__(self, num_drafts: int, number_of_states: int = 1) -> None:
        super().__init__(number_of_states=number_of_states)
        self.num_drafts = num_drafts
        self.pool: StatePool | None = None

    def begin(self, step: BatchStep) -> None:
        self.step = step

    def pool_for(self, shape: GatedDeltaNetShape, qkvz: Tensor, num_rows: int) -> StatePool:
        """The pages of all rows, made in the first step, where the layer is."""
        if self.pool is None:
            layout = PageLayout(
                num_key_heads=shape.num_key_heads,
                num_value_heads=shape.num_value_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                num_drafts=self.num_drafts,
                activation_dtype=qkvz.dtype,
                state_dtype=torch.float32,
            )
            size = (num_rows, -(-layout.page_bytes // ALIGNMENT) * ALIGNMENT)
            self.pool = layout.view(torch.empty(size, dtype=torch.uint8, device=qkvz.device))
        return self.pool


class RowCache(Cache):
    """The cache of a model and its MTP layer, which comes last."""

    layers: list[Any]
    step: BatchStep  # the one that runs
    trunk: Any = None  # runs all steps of an answer, if not the host's
    linear: type[PageLayer] = PageLayer
    attention: type[KeyValueLayer] = KeyValueLayer

    def __init__(self, layer_types: list[str], *, num_drafts: int) -> None:
        attention = SequenceLayer if env.batch_invariant() else self.attention
        layers = [
            self.linear(num_drafts) if kind == "linear_attention" else attention()
            for kind in layer_types
        ]
        super().__init__(layers=[*layers, self.attention()])

    def begin(self, step: BatchStep) -> None:
        """Say which columns the trunk's next pass writes."""
        self.step = step
        for layer in self.layers:
            layer.begin(step)

    def begin_mtp(self, step: BatchStep) -> None:
        """Say which columns the MTP layer's next pass writes."""
        self.layers[-1].begin(step)

    def check(self) -> None:
        """Raise the error that a GPU's kernels recorded since the last check. Waits for the GPU.

        Raises: RuntimeError: a row's page could not continue at its context length.
        """
        pools = [layer.pool for layer in self.layers if isinstance(layer, PageLayer)]
        for device in {pool.span.device for pool in pools if pool is not None}:
            if device.type == "cuda":
                faults.check(device)
