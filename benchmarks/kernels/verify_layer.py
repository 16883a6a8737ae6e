"""Convolution and recurrence together, as a layer verifies drafts."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention

from benchmarks.kernels.inputs import (
    ACCEPTED,
    DRAFT,
    DTYPE,
    GRID,
    HV,
    PAGES,
    C,
    H,
    K,
    V,
    every_slot,
    layer_inputs,
    mixed,
    parameters,
    state_pool,
    step_of,
    turns,
)
from benchmarks.kernels.timing import Case
from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule


def cases() -> Iterator[Case]:
    """One case."""
    yield verify_layer(f"verify {DRAFT} drafts, batch 8", 8)


def verify_layer(name: str, batch: int) -> Case:
    """Upstream's layer as it verifies without AMX: one convolution call for each sequence."""
    n = 1 + DRAFT
    x, (A_log, dt_bias), pool = layer_inputs(batch * n), parameters(), state_pool(DRAFT)
    weight = torch.randn(C, 4).to(DTYPE)
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    b, a = x["b"].flatten(1), x["a"].flatten(1)
    advance = 1 + ACCEPTED
    ours = turns(batch, advance)

    def plugin() -> Tensor:
        slot, context_len = next(ours)
        step = step_of(starts, slot, context_len, n)
        q, k, v = causal_conv1d(q=x["q"], k=x["k"], v=x["v"], weight=weight, pool_=pool, step=step)
        return gated_delta_rule(
            q=q, k=k, v=v.view(-1, HV, V), a=x["a"], b=x["b"], A_log=A_log, dt_bias=dt_bias,
            pool_=pool, step=step,
        )  # fmt: skip

    def rearrange(mixed_qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = mixed_qkv.split([H * K, H * K, HV * V], dim=-1)
        return q.view(1, -1, H, K), k.view(1, -1, H, K), v.view(1, -1, HV, V)

    layer = SimpleNamespace(
        conv1d=SimpleNamespace(weight=weight, bias=None), activation="silu",
        rearrange_mixed_qkv=rearrange, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip
    states = torch.zeros(PAGES * n, HV, K, V)
    inputs = torch.zeros(PAGES * n, C, 3 + DRAFT, dtype=DTYPE)
    accepted = torch.full((batch,), advance, dtype=torch.int32)
    columns = torch.arange(n, dtype=torch.int32)
    tables = itertools.cycle([page[:, None] * n + columns for page in every_slot(batch)])

    def upstreams() -> Tensor:
        metadata = SimpleNamespace(
            num_spec_decodes=batch, spec_state_indices_tensor=next(tables),
            spec_query_start_loc=starts, num_accepted_tokens=accepted,
        )  # fmt: skip
        with patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
            return gdn_attention._spec_forward(
                layer, metadata, mixed(x), b, a, inputs, states, 4, 3 + DRAFT
            )

    return Case(name, plugin, upstreams, calls=GRID * PAGES // batch)
