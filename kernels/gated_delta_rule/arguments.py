"""What the gated delta rule asks of its arguments; cpu.cpp asks the same."""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.checks import ACTIVATIONS, FLOAT, INT, check, check_page, check_step
from qwen3next_plugin.kernels.step import GRID

MAX_HEAD_DIM = 256


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state_: Tensor,
    key_: Tensor,
    u_: Tensor,
    g_: Tensor,
    span_: Tensor,
    query_start_loc: Tensor,
    slot: Tensor,
    context_len: Tensor,
) -> None:
    """Raise ValueError unless the shapes, dtypes, devices and strides are the public op's."""
    op = "gated_delta_rule"
    (T, H, K), (_, HV, V), W = q.shape, v.shape, key_.shape[1]
    if H == 0 or HV % H or K > MAX_HEAD_DIM:
        raise ValueError(f"{op}: cannot serve {H} key heads of dim {K} with {HV} value heads")
    if W < GRID:
        raise ValueError(f"{op}: key_ holds {W} tokens, fewer than a cell of {GRID}")
    device, activations, parameters = q.device, (q.dtype,), (q.dtype, torch.float32)
    check(op, "q", q, (T, H, K), ACTIVATIONS, device)
    check(op, "k", k, (T, H, K), activations, device)
    check(op, "v", v, (T, HV, V), activations, device)
    check(op, "a", a, (T, H, HV // H), activations, device)
    check(op, "b", b, (T, H, HV // H), activations, device)
    check(op, "A_log", A_log, (HV,), parameters, device)
    check(op, "dt_bias", dt_bias, (HV,), parameters, device)
    check_page(op, "state_", state_, (HV, K, V), (torch.float32, torch.bfloat16), device)
    check_page(op, "key_", key_, (W, H, K), FLOAT, device)
    check_page(op, "u_", u_, (W, HV, V), FLOAT, device)
    check_page(op, "g_", g_, (W, HV), FLOAT, device)
    check_page(op, "span_", span_, (2,), INT, device)
    check_step(op, query_start_loc, slot, context_len, device)
