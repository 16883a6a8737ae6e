"""The causal convolution: decode, verify and prefill.

Upstream's time includes the copy that makes its input contiguous; ours reads the projection in
place.
"""

from collections.abc import Iterator

import torch
import vllm._custom_ops as upstream
from torch import Tensor

from benchmarks.kernels.inputs import (
    ACCEPTED,
    DRAFT,
    DTYPE,
    PAGES,
    C,
    int32,
    layer_inputs,
    mixed,
    slots_in_turn,
    spans_in_turn,
    state_pool,
    step_of,
)
from benchmarks.kernels.timing import Case, record
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


def measure(run: Run) -> Iterator[Record]:
    yield record(run, "convolution", "How fast is the causal convolution?", cases)


def cases() -> Iterator[Case]:
    """Every case, with fresh states."""
    for batch in (1, 8):
        yield convolution(f"decode, batch {batch}", batch, 1)
        yield convolution(f"verify {DRAFT} drafts, batch {batch}", batch, 1 + DRAFT)
    for tokens in (1024, 4096):
        yield long_convolution(f"prefill {tokens:,}", tokens)


def convolution(name: str, batch: int, n: int) -> Case:
    x, weight, pool = layer_inputs(batch * n), torch.randn(C, 4).to(DTYPE), state_pool(n - 1)
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    advance = 1 if n == 1 else 1 + ACCEPTED
    ours, theirs = spans_in_turn(batch, n, advance), slots_in_turn(batch)

    def plugin() -> Tensor:
        slot, context_len, span = next(ours)
        step = step_of(starts, slot, context_len, n)
        return convolved(x, weight, pool._replace(span=span), step)

    packed = upstream.causal_conv1d_weight_pack(weight)
    states = torch.zeros(PAGES, 3 + n - 1, C, dtype=DTYPE).transpose(1, 2)
    accepted = None if n == 1 else torch.full((batch,), advance, dtype=torch.int32)
    shape = (batch, C) if n == 1 else (batch, n, C)

    def update() -> Tensor:
        return upstream.causal_conv1d_update_cpu(
            x=mixed(x).view(shape), conv_states=states, weight=packed, bias=None,
            silu_activation=True, conv_state_indices=next(theirs), is_weight_packed=True,
            num_accepted_tokens=accepted,
        )  # fmt: skip

    return Case(name, plugin, update, calls=PAGES // batch)


def long_convolution(name: str, tokens: int) -> Case:
    x, weight, pool = layer_inputs(tokens), torch.randn(C, 4).to(DTYPE), state_pool(0)
    starts, fresh = int32(0, tokens), int32(0)
    ours, theirs = slots_in_turn(1), slots_in_turn(1)

    def plugin() -> Tensor:
        return convolved(x, weight, pool, step_of(starts, next(ours), fresh, tokens))

    packed = upstream.causal_conv1d_weight_pack(weight)
    states = torch.zeros(PAGES, 3, C, dtype=DTYPE).transpose(1, 2)
    no_past = torch.tensor([False])

    def forward() -> Tensor:
        return upstream.causal_conv1d_fwd_cpu(
            x=mixed(x).t(), weight=packed, bias=None, conv_states=states, query_start_loc=starts,
            cache_indices=next(theirs), has_initial_state=no_past, silu_activation=True,
            is_weight_packed=True,
        ).t()  # fmt: skip

    return Case(name, plugin, forward)


def convolved(x: dict[str, Tensor], weight: Tensor, pool: StatePool, step: Step) -> Tensor:
    """The plugin's convolution. Returns the one buffer that its three results are views of."""
    q, _, _ = causal_conv1d(q=x["q"], k=x["k"], v=x["v"], weight=weight, pool_=pool, step=step)
    return q.as_strided((len(q), C), (C, 1))
