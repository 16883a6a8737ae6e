"""The cache of a speculating batch: every row can go back to any token of its last step.

Rows of a batch keep drafts of different lengths, so each has its own length. Keys and values are
stored by column: what a row rejected is overwritten by its next step. A linear layer keeps S at
the start of the step and the parts of the step's tokens (its window), of which `keep` adds those
that were accepted. So S is never undone.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer

from qwen3next_plugin import env
from qwen3next_plugin.engines.transformers.state.steps import Step
from qwen3next_plugin.kernels import step as kernels
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape
from qwen3next_plugin.model.state import PageLayout

ALIGNMENT = 64  # bytes; a page's size is a multiple
GROWTH = 256  # columns by which the memory for keys and values grows, at least


class KeyValueLayer(DynamicLayer):
    """Keys and values of one attention layer; a row's token at column c lies in slot c."""

    step: Step  # the one that runs

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


class Window(NamedTuple):
    """What the last step of a linear layer adds to S, token by token.

    Shapes: key [B, H, 1, n, K]; u [B, H, R, n, V]; decay [B, H, R, n], the log decay since the
        step began; inputs [B, C, 3 + n] of the convolution, with those before the step
    """

    key: Tensor
    u: Tensor
    decay: Tensor
    inputs: Tensor


class PageLayer(LinearAttentionLayer):
    """The state of one linear layer: the host's own after a prompt, and then a window on it."""

    def __init__(self) -> None:
        super().__init__()
        self.window: Window | None = None

    @property
    def started(self) -> bool:
        """Whether it has read a prompt."""
        return self.recurrent_states[0] is not None

    def keep(self, counts: Tensor) -> None:
        """Add the first `counts` tokens of each row's last step to its state.

        Shapes: counts [B], from 1 to n
        """
        if self.window is None:
            return
        (key, u, decay, inputs), self.window = self.window, None
        n = decay.shape[-1]
        last = (counts - 1).to(decay.device)[:, None, None, None]
        total = decay.gather(-1, last.expand(*decay.shape[:3], 1))  # [B, H, R, 1]
        since = (total - decay).masked_fill(torch.arange(n, device=decay.device) > last, -torch.inf)
        state = self.recurrent_states[0]  # [B, HV, K, V]
        added = (key * since.exp()[..., None]).transpose(-1, -2) @ u  # [B, H, R, K, V]
        state.mul_(total.exp().flatten(1, 2)[..., None]).add_(added.flatten(1, 2))
        before = inputs.shape[-1] - n  # of a token's convolution
        columns = last[:, :, 0] + 1 + torch.arange(before, device=inputs.device)  # [B, 1, 3]
        self.conv_states[0] = inputs.gather(-1, columns.expand(-1, inputs.shape[1], -1))


class KernelPage(LinearAttentionLayer):
    """The state pages of a linear layer for the plugin's kernels; a row's slot is its number."""

    step: Step  # the one that runs

    def __init__(self, drafts: int) -> None:
        super().__init__()
        self.drafts = drafts
        self.pool: StatePool | None = None

    def pool_for(self, shape: GatedDeltaNetShape, dtype: torch.dtype) -> StatePool:
        """The pages of all rows, made when the first layer asks for them."""
        if self.pool is None:
            layout = PageLayout(
                num_key_heads=shape.num_key_heads,
                num_value_heads=shape.num_value_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                draft_tokens=self.drafts,
                activation_dtype=dtype,
                state_dtype=torch.float32,
            )
            columns = self.step.columns
            size = (len(columns), -(-layout.page_bytes // ALIGNMENT) * ALIGNMENT)
            pages = torch.zeros(size, dtype=torch.uint8, device=columns.device)
            self.pool = layout.view(pages)
        return self.pool

    def kernel_step(self) -> kernels.Step:
        """The step as kernels take it. Padding before a prompt are tokens that leave S at zero."""
        B, n = self.step.columns.shape
        numbers = torch.arange(B + 1, dtype=torch.int32, device=self.step.columns.device)
        return kernels.Step(
            query_start_loc=numbers * n,
            slot=numbers[:-1],
            context_len=self.step.columns[:, 0].int(),
            num_tokens=B * n,
            max_query_len=n,
        )


class RowCache(Cache):
    """The cache of a model and its MTP layer, which comes last."""

    def __init__(self, layer_types: list[str], *, drafts: int) -> None:
        def layer(kind: str) -> Any:
            if kind == "full_attention":
                return KeyValueLayer()
            return PageLayer() if env.kernels() == "auto" else KernelPage(drafts)

        super().__init__(layers=[layer(kind) for kind in (*layer_types, "full_attention")])

    def begin(self, step: Step) -> None:
        """Say which columns the next pass writes."""
        for layer in self.layers:
            if isinstance(layer, KeyValueLayer | KernelPage):
                layer.step = step

    def keep(self, counts: Tensor) -> None:
        """Keep the first `counts` [B] tokens of each row's last step."""
        for layer in self.layers:
            if isinstance(layer, PageLayer):
                layer.keep(counts)
