"""Gated DeltaNet layers with random parameters, inputs and pages, and the steps that run them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from unittest.mock import patch

import torch
from torch import Tensor

from qwen3next_plugin.kernels.gated_delta_rule import triton as kernels
from qwen3next_plugin.kernels.gated_delta_rule.operands import inputs, pages
from qwen3next_plugin.kernels.gpu.configs import Config, config_for
from qwen3next_plugin.kernels.gpu.rows import step_tensors
from qwen3next_plugin.kernels.step import GRID
from qwen3next_plugin.model.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    attend,
)
from qwen3next_plugin.model.state import PageLayout
from qwen3next_plugin.model.step import Step


@dataclass(frozen=True, slots=True)
class Work:
    """A step of one rank's layer: the number of tokens in each row. A prefill starts a request."""

    name: str
    layout: PageLayout
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def prefills(self) -> bool:
        return max(self.lengths) > self.layout.num_drafts + 1

    def is_split(self, config: Config) -> bool:
        """Whether a row is long enough to be split into segments."""
        s = self.layout
        is_long = max(self.lengths) >= config.split_from
        return is_long and config.splits(s.num_value_heads, s.key_dim, s.value_dim)

    def bytes(self) -> float:
        """Bytes that the step must move: S is read once and written once in GRID tokens.

        A row also replays its window since the last grid point. On average half of a draft is
        accepted.
        """
        s, N, T = self.layout, len(self.lengths), self.tokens
        H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
        S = s.nbytes()["state"]
        activations = s.activation_dtype.itemsize * T * (2 * H * K + 3 * HV * V + 2 * HV)
        if self.prefills:
            return activations + N * S
        advance = 1 + s.num_drafts / 2
        window = T + N * ((GRID - 1) / 2 + advance)
        convolution = s.activation_dtype.itemsize * s.conv_dim * (T + 3 * N)
        entry = 4 * (H * K + HV * V + HV)
        return activations + convolution + window * entry + N * S * (1 + advance / GRID)

    def flops(self, chunk: int) -> float:
        """Floating-point operations of the chunked form, without the triangular inverse."""
        s = self.layout
        K, V = s.key_dim, s.value_dim
        return self.tokens * s.num_value_heads * (4 * chunk * (K + V) + 6 * K * V)


class Layer:
    """One layer: a page for each row, and random projections of all tokens of a step."""

    def __init__(self, work: Work, device: torch.device) -> None:
        s, T, dtype = work.layout, work.tokens, work.layout.activation_dtype
        H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
        self.shape = GatedDeltaNetShape(H, HV, K, V)
        page = ceil(s.page_bytes / 256) * 256
        self.pool = s.view(torch.zeros(len(work.lengths), page, dtype=torch.int8, device=device))
        self.qkvz, self.ba = self.projections(T, dtype, device)
        self.weights = GatedDeltaNetWeights(
            conv=torch.randn(s.conv_dim, 4, device=device).to(dtype) / 2,
            A_log=torch.empty(HV, device=device).uniform_(0, 2),
            dt_bias=torch.empty(HV, device=device).uniform_(-6, -2),  # slow decay
            norm=torch.rand(V, device=device).to(dtype) + 0.5,
            norm_eps=1e-6,
        )
        # Inputs of the recurrence alone, as a convolution would return them.
        self.q, self.k = torch.randn(2, T, H, K, dtype=dtype, device=device)
        self.v = torch.randn(T, HV, V, dtype=dtype, device=device)
        self.a, self.b = torch.randn(2, T, HV, dtype=dtype, device=device)

    def projections(self, T: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """Random qkvz and ba of T tokens."""
        s = self.shape
        H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
        widths = (2 * (H * K + HV * V), 2 * HV)
        return tuple(torch.randn(T, width, dtype=dtype, device=device) for width in widths)

    def whole(self, step: Step) -> Tensor:
        """Convolution, recurrence and gated norm, as a model runs them."""
        return self.run(self.qkvz, self.ba, step)

    def run(self, qkvz: Tensor, ba: Tensor, step: Step) -> Tensor:
        return attend(
            qkvz=qkvz, ba=ba, weights=self.weights, shape=self.shape, pool_=self.pool, step=step
        )

    def recurrence(self, step: Step) -> Tensor:
        """The recurrence alone, [T, HV, V]."""
        H, R = self.shape.num_key_heads, self.shape.values_per_key
        v, a, b = (x.unflatten(1, (H, R)) for x in (self.v, self.a, self.b))
        pool, out = self.pool, torch.empty_like(self.v, memory_format=torch.contiguous_format)
        kernels.run_layer(
            x=inputs(self.q, self.k, v, a, b, self.weights.A_log, self.weights.dt_bias),
            conv=None,
            norm=None,
            pages=pages(pool),
            step=step_tensors(step, pool.span),
            max_query_len=step.max_query_len,
            out_=out,
        )
        return out

    def unsplit(self, step: Step) -> Tensor:
        """The recurrence without splitting any row."""
        config = replace(config_for(self.v.device), processors=0)
        with patch.object(kernels, "config_for", lambda device: config):
            return self.recurrence(step)

    def settled(self, context_len: Tensor) -> Tensor:
        """S [N, HV, K, V] in fp32 after all committed tokens."""
        pool, R = self.pool, self.shape.values_per_key
        W, start = pool.key.shape[1], pool.span[:, 0]
        p0 = torch.where(context_len == 0, 0, start // GRID * GRID)
        row = torch.arange(len(start), device=start.device)
        S = torch.where((p0 > 0)[:, None, None, None], pool.state.float(), 0.0)
        for p in (p0 + i for i in range(GRID + W)):
            key, u, g = (ring[row, p % W] for ring in (pool.key, pool.u, pool.g))
            key = key.repeat_interleave(R, dim=1)
            after = g.exp()[..., None, None] * S + key[..., :, None] * u[..., None, :]
            S = torch.where((p < context_len)[:, None, None, None], after, S)
        return S


def step_of(lengths: tuple[int, ...], context_len: Tensor) -> Step:
    """A step with `lengths` tokens in its rows; row i has page i."""
    starts = torch.tensor([0, *lengths], device=context_len.device).cumsum(0)
    return Step(
        query_start_loc=starts.int(),
        slot=torch.arange(len(lengths), dtype=torch.int32, device=context_len.device),
        context_len=context_len,
        num_tokens=sum(lengths),
        max_query_len=max(lengths),
    )


class Turns:
    """Layers that run one step in turn, as in an engine, so that no page is still in a cache."""

    def __init__(self, work: Work, layers: int, device: torch.device) -> None:
        self.work, self.device = work, device
        self.layers = [Layer(work, device) for _ in range(layers)]
        self.context_len = torch.zeros(len(work.lengths), dtype=torch.int32, device=device)
        self.step = step_of(work.lengths, self.context_len)
        if not work.prefills:
            self._begin()

    def _begin(self) -> None:
        """Give each row a past of random length, so that they write S in different steps."""
        lengths = torch.randint(1, 3 * GRID, (len(self.work.lengths),))
        step = step_of(tuple(lengths.tolist()), self.context_len)
        for layer in self.layers:
            dtype = self.work.layout.activation_dtype
            qkvz, ba = layer.projections(step.num_tokens, dtype, self.device)
            layer.run(qkvz, ba, step)
        self.context_len.copy_(lengths)

    def advance(self) -> None:
        """Commit one token of each row, and a random part of its draft."""
        if not self.work.prefills:
            drafts = self.work.layout.num_drafts
            self.context_len += 1
            self.context_len += torch.randint(
                0, drafts + 1, self.context_len.shape, dtype=torch.int32, device=self.device
            )

    def calls(self, of: Callable[[Layer, Step], Tensor]) -> list[Callable[[], Tensor]]:
        """A call for each layer in turn."""
        return [partial(of, layer, self.step) for layer in self.layers]
