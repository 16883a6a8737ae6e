"""The gated delta rule: decode, verify and prefill."""

import itertools
from collections.abc import Iterator

import torch
import vllm._custom_ops as upstream
from torch import Tensor

from benchmarks.kernels.inputs import (
    ACCEPTED,
    DRAFT,
    GRID,
    HV,
    PAGES,
    K,
    V,
    every_slot,
    int32,
    layer_inputs,
    parameters,
    slots_in_turn,
    state_pool,
    step_of,
    turns,
)
from benchmarks.kernels.timing import Case, record
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule


def measure(run: Run) -> Iterator[Record]:
    yield record(run, "delta_rule", "How fast is the gated delta rule?", cases)


def cases() -> Iterator[Case]:
    """Every case, with fresh states."""
    for batch in (1, 8):
        yield recurrence(f"decode, batch {batch}", batch, 1)
        yield recurrence(f"verify {DRAFT} drafts, batch {batch}", batch, 1 + DRAFT)
    yield recurrence("decode, batch 16", 16, 1)
    for tokens in (1024, 4096):
        yield prefill(f"prefill {tokens:,}", tokens)


def recurrence(name: str, batch: int, n: int) -> Case:
    x, (A_log, dt_bias), pool = layer_inputs(batch * n), parameters(), state_pool(n - 1)
    x = {**x, "v": x["v"].reshape(-1, HV, V)}
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    q, k, v = (x[name].contiguous() for name in "qkv")
    a, b = x["a"].flatten(1), x["b"].flatten(1)
    advance = 1 if n == 1 else 1 + ACCEPTED
    ours = turns(batch, advance)

    def plugin() -> Tensor:
        slot, context_len = next(ours)
        return gated_delta_rule(
            **x, A_log=A_log, dt_bias=dt_bias,
            pool_=pool, step=step_of(starts, slot, context_len, n),
        )  # fmt: skip

    states = torch.zeros(PAGES * n, HV, K, V)
    slots = slots_in_turn(batch)
    shared = {"A_log": A_log, "dt_bias": dt_bias, "cu_seqlens": starts}

    def decode() -> Tensor:
        return upstream.fused_sigmoid_gating_delta_rule_update_cpu(
            q=q[None], k=k[None], v=v[None], a=a, b=b, **shared, initial_state_source=states,
            initial_state_indices=next(slots), use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    accepted = torch.full((batch,), advance, dtype=torch.int32)
    columns = torch.arange(n, dtype=torch.int32)
    tables = itertools.cycle([page[:, None] * n + columns for page in every_slot(batch)])

    def verify() -> Tensor:
        return upstream.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            q=q, k=k, v=v, a=a, b=b, **shared, initial_state_source=states,
            spec_state_indices=next(tables), num_accepted_tokens=accepted,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    # GRID rounds, so that S is written as often as when serving
    return Case(name, plugin, decode if n == 1 else verify, calls=GRID * PAGES // batch)


def prefill(name: str, tokens: int) -> Case:
    x, (A_log, dt_bias), pool = layer_inputs(tokens), parameters(), state_pool(0)
    x = {**x, "v": x["v"].reshape(-1, HV, V)}
    q, k, v = (x[name].contiguous()[None] for name in "qkv")
    a, b = (x[name].flatten(1) for name in "ab")
    starts, fresh, states = int32(0, tokens), int32(0), torch.zeros(PAGES, HV, K, V)
    ours, theirs = slots_in_turn(1), slots_in_turn(1)

    def plugin() -> Tensor:
        return gated_delta_rule(
            **x, A_log=A_log, dt_bias=dt_bias,
            pool_=pool, step=step_of(starts, next(ours), fresh, tokens),
        )  # fmt: skip

    def chunked() -> Tensor:
        g, beta = upstream.fused_gdn_gating_cpu(A_log=A_log, a=a, b=b, dt_bias=dt_bias)
        slot = next(theirs)
        states[slot] = 0
        return upstream.chunk_gated_delta_rule_cpu(
            query=q, key=k, value=v, g=g, beta=beta, initial_state=states,
            output_final_state=True, cu_seqlens=starts, head_first=False,
            use_qk_l2norm_in_kernel=True, initial_state_indices=slot,
        )[0]  # fmt: skip

    return Case(name, plugin, chunked)
