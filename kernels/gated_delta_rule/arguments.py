"""What a backend of the gated delta rule takes, and the checks of it; cpu.cpp checks the same."""

from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import (
    ACTIVATIONS,
    FLOAT,
    INT,
    check,
    check_page,
    check_step,
    sizes,
)
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID, Step

MAX_HEAD_DIM = 256
STATES = (torch.float32, torch.bfloat16)


class RuleInputs(NamedTuple):
    """Shapes: q, k [T, H, K], v [T, HV, V], a, b [T, H, HV / H]; any strides but the last"""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor


class RuleWeights(NamedTuple):
    """Shapes: A_log, dt_bias [HV]"""

    A_log: Tensor
    dt_bias: Tensor


def check_arguments(x: RuleInputs, weights: RuleWeights, pool: StatePool, step: Step) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op, q = "gated_delta_rule", x.q
    (T, H, K), (_, HV, V) = sizes(op, "q", q, 3), sizes(op, "v", x.v, 3)
    _, W, _, _ = sizes(op, "key_", pool.key, 4)
    slots, _ = sizes(op, "span_", pool.span, 2)
    if H == 0 or HV % H or not 0 < K <= MAX_HEAD_DIM or not V:
        raise ValueError(f"{op}: cannot serve {H} key heads of dim {K} with {HV} value heads")
    if W < GRID:
        raise ValueError(f"{op}: key_ holds {W} tokens, fewer than a cell of {GRID}")
    device, activations, parameters = q.device, (q.dtype,), (q.dtype, torch.float32)
    check(op, "q", q, (T, H, K), ACTIVATIONS, device)
    check(op, "k", x.k, (T, H, K), activations, device)
    check(op, "v", x.v, (T, HV, V), activations, device)
    check(op, "a", x.a, (T, H, HV // H), activations, device)
    check(op, "b", x.b, (T, H, HV // H), activations, device)
    check(op, "A_log", weights.A_log, (HV,), parameters, device)
    check(op, "dt_bias", weights.dt_bias, (HV,), parameters, device)
    check_page(op, "state_", pool.state, (HV, K, V), STATES, device, slots)
    check_page(op, "key_", pool.key, (W, H, K), FLOAT, device, slots)
    check_page(op, "u_", pool.u, (W, HV, V), FLOAT, device, slots)
    check_page(op, "g_", pool.g, (W, HV), FLOAT, device, slots)
    check_page(op, "span_", pool.span, (2,), INT, device)
    check_step(op, step, device)
