"""Arguments of the Triton kernels of a linear-attention layer, as bundles with their strides."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.gpu.convolution import Convolution
from qwen3next_plugin.kernels.pages import StatePool


class Inputs(NamedTuple):
    """The layer's projections, with the strides between tokens and between heads, in elements.

    Shapes: q, k [T, H, K], v [T, H, R, V] (v_value: from value head to value head), a, b [T, H, R]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    q_token: int
    q_head: int
    k_token: int
    k_head: int
    v_token: int
    v_head: int
    v_value: int
    a_token: int
    a_head: int
    b_token: int
    b_head: int
    A_log: Tensor
    dt_bias: Tensor


def inputs(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
) -> Inputs:
    """v is [T, H, R, V]."""
    return Inputs(
        q, k, v, a, b,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), v.stride(2),
        a.stride(0), a.stride(1), b.stride(0), b.stride(1),
        A_log, dt_bias,
    )  # fmt: skip


def no_convolution(x: Inputs) -> Convolution:
    """A placeholder for a kernel that does not convolve."""
    return Convolution(x.q, x.q, 0)


class Chunks(NamedTuple):
    """Inputs of the scan over chunks of C positions: q and k are normalised, g is fp32.

    Shapes: q, k [T, H, K], v [T, HV, V], g [T, HV], inverse, attention [T, HV, C]
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    inverse: Tensor
    attention: Tensor


class Norm(NamedTuple):
    """The gated norm: gate z [T, H, R, V], weight [V]."""

    z: Tensor
    z_token: int
    z_head: int
    z_value: int
    weight: Tensor
    eps: float


def gated_norm(z: Tensor, weight: Tensor, eps: float) -> Norm:
    return Norm(z, z.stride(0), z.stride(1), z.stride(2), weight, eps)


def no_norm(x: Inputs) -> Norm:
    """A placeholder for a kernel that does not norm."""
    return Norm(x.v, 0, 0, 0, x.v, 0.0)


class Pages(NamedTuple):
    """State and window of every page, each with its stride between slots."""

    state: Tensor
    key: Tensor
    u: Tensor
    g: Tensor
    state_slot: int
    key_slot: int
    u_slot: int
    g_slot: int


def pages(pool: StatePool) -> Pages:
    state, key, u, g = pool[:4]
    return Pages(state, key, u, g, state.stride(0), key.stride(0), u.stride(0), g.stride(0))
