"""Scalar functions in fp32."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def softplus(x):
    """log(1 + exp x). For small y = exp x, log(1 + y) · y / ((1 + y) − 1) keeps every digit."""
    y = tl.exp(tl.where(x > 20.0, 20.0, x))  # a minimum would drop NaN
    w = 1.0 + y
    small = w == 1.0
    log1p = tl.where(small, y, tl.log(w) * y / tl.where(small, 1.0, w - 1.0))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def log_decay(a, A_log, dt_bias):
    """g = -exp(A_log) softplus(a + dt_bias)."""
    return -tl.exp(A_log) * softplus(a + dt_bias)
