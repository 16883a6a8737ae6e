"""What the recurrence is compared with: a plain loop in fp32, and other packages' kernels.

A baseline is a call without arguments that returns [T, HV, V]. It is None if its package is not
installed or cannot do the work.
"""

import functools
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.gpu.layer import Layer, Work
from qwen3next_plugin.kernels.gated_delta_rule.reference import l2_normalise

Call = Callable[[], Tensor]


def plain(layer: Layer, lengths: tuple[int, ...], S: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Indices [N, tokens] of the first `tokens` tokens of each row, and their outputs."""
    starts = torch.tensor([0, *lengths[:-1]], device=S.device).cumsum(0)
    at = starts[:, None] + torch.arange(tokens, device=S.device)
    R, K = layer.shape.values_per_key, layer.shape.key_dim
    q, k = (l2_normalise(x[at]).repeat_interleave(R, dim=2) for x in (layer.q, layer.k))
    weights = layer.weights
    decay = (-weights.A_log.exp() * softplus(layer.a[at].float() + weights.dt_bias)).exp()
    beta, v, out = layer.b[at].float().sigmoid(), layer.v[at].float(), []
    for t in range(tokens):
        S = decay[:, t, :, None, None] * S
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhkv,nhk->nhv", S, k[:, t]))
        S = S + k[:, t, ..., None] * u[..., None, :]
        out.append(torch.einsum("nhkv,nhk->nhv", S, q[:, t]) * K**-0.5)
    return at, torch.stack(out, 1)


def versions() -> str:
    """The packages that baselines come from, with the installed versions."""
    found = []
    for package in ("fla-core", "vllm"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def baseline(work: Work, layer: Layer, S: Tensor) -> Call | None:
    """Another package's kernel for this work: FLA's, and vLLM's for drafts."""
    if S.device.type == "cpu":
        return None
    if work.prefills:
        return _chunked(work, layer)
    if work.layout.num_drafts:
        return _verified(work, layer, S)
    return _decoded(layer, S) or _verified(work, layer, S)


def _gates(layer: Layer) -> dict:
    """Arguments with which FLA's kernels compute gates and norms themselves, as ours do."""
    return {
        "use_gate_in_kernel": True,
        "A_log": layer.weights.A_log,
        "dt_bias": layer.weights.dt_bias,
        "use_beta_sigmoid_in_kernel": True,
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": True,
    }


@functools.cache  # FLA caches host values by the identity of a tensor
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def _chunked(work: Work, layer: Layer) -> Call | None:
    """A batch if all rows have one length, else one sequence with offsets."""
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    except ImportError:
        return None
    even = len(set(work.lengths)) == 1
    shape = (len(work.lengths), -1) if even else (1, -1)
    q, k, v, a, b = (x.unflatten(0, shape) for x in (layer.q, layer.k, layer.v, layer.a, layer.b))
    offsets = None if even else _offsets(work.lengths, v.device)

    def call() -> Tensor:
        out, _ = chunk_gated_delta_rule(
            q=q, k=k, v=v, g=a, beta=b, cu_seqlens=offsets, **_gates(layer)
        )
        return out.flatten(0, 1)

    return call


def _decoded(layer: Layer, S: Tensor) -> Call | None:
    try:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
    except ImportError:
        return None
    q, k, v, a, b = (x[:, None] for x in (layer.q, layer.k, layer.v, layer.a, layer.b))

    def call() -> Tensor:
        out, _ = fused_recurrent_gated_delta_rule(
            q=q, k=k, v=v, g=a, beta=b, initial_state=S, **_gates(layer)
        )
        return out.flatten(0, 1)

    return call


def _verified(work: Work, layer: Layer, S: Tensor) -> Call | None:
    """A state per token of a row: one is read, and each token writes its own. State 0 is unused."""
    try:
        from vllm.third_party.flash_linear_attention.ops import (
            fused_sigmoid_gating_delta_rule_update,
        )
    except ImportError:
        return None
    N, n = len(work.lengths), work.layout.num_drafts + 1
    states = S.new_zeros(1 + N * n, *S.shape[1:]).transpose(-1, -2).contiguous()
    table = 1 + torch.arange(N * n, dtype=torch.int32, device=S.device).view(N, n)
    accepted = torch.randint(1, n + 1, (N,), dtype=torch.int32, device=S.device)
    row = torch.arange(N, device=S.device)
    read = table[row, accepted - 1].long()
    states[read] = S.transpose(-1, -2)
    starts = torch.arange(0, N * n + 1, n, dtype=torch.int32, device=S.device)

    def call() -> Tensor:
        out, _ = fused_sigmoid_gating_delta_rule_update(
            A_log=layer.weights.A_log, a=layer.a, b=layer.b, dt_bias=layer.weights.dt_bias,
            q=layer.q[None], k=layer.k[None], v=layer.v[None], initial_state=states,
            cu_seqlens=starts, ssm_state_indices=table, num_accepted_tokens=accepted,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return out.flatten(0, 1)

    return call
