"""Causal depthwise convolution of width 4 with SiLU, over the state pages of a batch."""

from torch import Tensor

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.causal_conv1d.arguments import ConvInputs
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import Step


def causal_conv1d(
    *, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, pool_: StatePool, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """y_t = silu(sum_j weight[:, j] x_{t-3+j}) over x = [q; k; v]; keeps each page's inputs.

    Runs before `gated_delta_rule`: it reads the pages' `span`, and the delta rule advances it.

    Shapes:
        q, k: [T, H, K], v: [T, H, R], R = HV / H * V; any strides but the last
        weight: [C, 4], C = H * (2 * K + R), fp32 or the activations' dtype
        pool_: reads `span`, updates `conv`
        returns q, k [T, H, K] and v [T, H, R], views of one contiguous [T, C]; zero in rows without
            a page

    Raises:
        ValueError: an argument's shape, stride, device or dtype.
        RuntimeError: a row's tokens, slot or context length out of range; nothing is written.

    Source: `causal_conv1d_fn` and `causal_conv1d_update` of transformers' Qwen3-Next.
    """
    run = dispatch.implementation("causal_conv1d", q.device)
    out = run(ConvInputs(q, k, v), weight, pool_, step)  # [T, C]
    (T, H, K), R = q.shape, v.shape[-1]
    q, k, v = out.split([H * K, H * K, H * R], dim=-1)
    return q.view(T, H, K), k.view(T, H, K), v.view(T, H, R)
