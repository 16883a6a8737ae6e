"""The gate as its equation."""

from math import sqrt

from torch import Tensor

from qwen3next_plugin.kernels.hyper_connection.reference import add_block, normalised
from qwen3next_plugin.kernels.ple_gate.arguments import PLENorms


def run(
    streams_: Tensor,
    keys: Tensor,
    values: Tensor,
    norms: PLENorms,
    eps: float,
    block: Tensor | None,
    injection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in the public op."""
    dtype, D = streams_.dtype, values.shape[1]
    add_block(streams_, block, injection)
    query = normalised(streams_, norms.query, eps)  # [T, hc, D]
    key = normalised(keys.unflatten(1, (-1, D)), norms.key, eps)
    score = (key * query).sum(-1, keepdim=True) / sqrt(D)
    gate = (score.sign() * score.abs().clamp_min(1e-6).sqrt()).sigmoid()
    gated = (gate * values.float()[:, None]).to(dtype)
    return gated.flatten(1), normalised(gated, norms.conv, eps).to(dtype).flatten(1)
