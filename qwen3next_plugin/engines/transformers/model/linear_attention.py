"""transformers' linear layer, which a batch of drafts can also go back in."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu, softplus

from qwen3next_plugin.engines.transformers.state.pages import (
    KernelPage,
    PageLayer,
    RowCache,
    Window,
)
from qwen3next_plugin.kernels.gated_delta_net import GatedDeltaNetWeights
from qwen3next_plugin.model.gated_delta_net import (
    GatedDeltaNetShape,
    attend,
    split_projections,
)

EPSILON = 1e-6  # of the norm of q and k


@cache
def stepping(host: type[nn.Module]) -> type[nn.Module]:
    """The host's layer class, with our step where a `RowCache` has read the prompt."""

    class GatedDeltaNet(host):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            caches = [value for value in (*args, *kwargs.values()) if isinstance(value, RowCache)]
            page = caches[0].layers[self.layer_idx] if caches else None
            if isinstance(page, KernelPage):
                return by_kernels(self, hidden_states, kwargs.get("attention_mask"), page)
            if page is not None and page.started:
                return step(self, hidden_states, page)
            return super().forward(hidden_states, *args, **kwargs)

    return GatedDeltaNet


def by_kernels(
    layer: Any, hidden_states: Tensor, attention_mask: Tensor | None, page: KernelPage
) -> Tensor:
    """Prompts and steps on the plugin's kernels.

    Shapes: hidden_states [B, T, D], returns the same; attention_mask [B, T]
    """
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[..., None].to(hidden_states.dtype)
    qkvz, ba = project(layer, hidden_states.flatten(0, 1))
    out = attend(
        qkvz=qkvz,
        ba=ba,
        weights=GatedDeltaNetWeights(
            conv=layer.conv1d.weight.squeeze(1),
            A_log=layer.A_log,
            dt_bias=layer.dt_bias,
            norm=layer.norm.weight,
            norm_eps=layer.layer_norm_epsilon,
        ),
        shape=shape_of(layer),
        pool_=page.pool_for(shape_of(layer), qkvz.dtype),
        step=page.kernel_step(),
    )
    return layer.out_proj(out.view(*hidden_states.shape[:2], -1))


def step(layer: Any, hidden_states: Tensor, page: PageLayer) -> Tensor:
    """A few tokens of each row, which `page.keep` will add to the state as far as they are right.

    Shapes: hidden_states [B, n, D], returns the same
    """
    B, n, _ = hidden_states.shape
    x = split_projections(*project(layer, hidden_states.flatten(0, 1)), shape_of(layer))
    H, R, V = x.v.shape[1:]
    inputs = torch.cat([part.reshape(B, n, -1) for part in (x.q, x.k, x.v)], dim=-1)
    inputs = inputs.transpose(1, 2)  # [B, C, n]
    before = layer.conv_kernel_size - 1
    inputs = torch.cat([page.conv_states[0][..., -before:], inputs], dim=-1)
    weight = layer.conv1d.weight
    mixed = silu(conv1d(inputs.to(weight.dtype), weight, layer.conv1d.bias, groups=len(weight)))
    q, k, v = mixed.transpose(1, 2).split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    q, k = (part.reshape(B, n, H, 1, -1).permute(0, 2, 3, 1, 4) for part in (q, k))
    v, b = (part.reshape(B, n, H, R, -1).permute(0, 2, 3, 1, 4) for part in (v, x.b))
    A_log, dt_bias = (part.float().view(H, R) for part in (layer.A_log, layer.dt_bias))
    decay = -A_log.exp() * softplus(x.a.float().view(B, n, H, R) + dt_bias)
    out, page.window = delta_rule(
        q=q,
        k=k,
        v=v.float(),
        decay=decay.permute(0, 2, 3, 1).cumsum(-1),  # [B, H, R, n]
        beta=b.sigmoid().float(),
        state=page.recurrent_states[0].float().unflatten(1, (H, R)),
        inputs=inputs,
    )
    out = out.permute(0, 3, 1, 2, 4).to(hidden_states.dtype)  # [B, n, H, R, V]
    normed = layer.norm(out.reshape(-1, V), x.z.reshape(-1, V))
    return layer.out_proj(normed.view(B, n, -1))


def delta_rule(
    *, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, inputs: Tensor
) -> tuple[Tensor, Window]:
    """The gated delta rule for all n tokens at once; the state stays as it is.

    u solves (1 + tril(β k·k decays)) u = β (v − S k), so no token waits for the one before it.

    Shapes: q, k [B, H, 1, n, K]; v [B, H, R, n, V]; decay [B, H, R, n], since the step began; beta
        [B, H, R, n, 1]; state [B, H, R, K, V]; returns [B, H, R, n, V] in fp32

    Source: Yang et al., Gated Delta Networks, arXiv 2412.06464.
    """
    n = k.shape[-2]
    k = normalise(k)
    both = torch.cat([k, normalise(q) * q.shape[-1] ** -0.5], dim=-2)  # [B, H, 1, 2n, K]
    since = decay.exp()[..., None]
    seen, asked = (both @ state).split(n, dim=-2)  # [B, H, R, n, V]
    between = (decay[..., :, None] - decay[..., None, :]).tril().exp().tril()  # [B, H, R, n, n]
    keys, queries = (both @ k.transpose(-1, -2)).split(n, dim=-2)  # [B, H, 1, n, n]
    u = beta * (v - since * seen)
    if n > 1:
        u = torch.linalg.solve_triangular(beta * keys * between, u, upper=False, unitriangular=True)
    return since * asked + (queries * between) @ u, Window(k, u, decay, inputs)


def normalise(x: Tensor) -> Tensor:
    """x over its norm, along the last dim, in fp32."""
    x = x.float()
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPSILON)


def project(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's input projections, qkvz and ba, in the order of `shape_of`'s layout."""
    if is_flat(layer):
        qkvz = torch.cat([layer.in_proj_qkv(x), layer.in_proj_z(x)], dim=-1)
        return qkvz, torch.cat([layer.in_proj_b(x), layer.in_proj_a(x)], dim=-1)
    return layer.in_proj_qkvz(x), layer.in_proj_ba(x)


def shape_of(layer: Any) -> GatedDeltaNetShape:
    """The layer's heads, and whether its projections are Qwen3.5's."""
    return GatedDeltaNetShape(
        num_key_heads=layer.num_k_heads,
        num_value_heads=layer.num_v_heads,
        key_dim=layer.head_k_dim,
        value_dim=layer.head_v_dim,
        layout="flat" if is_flat(layer) else "grouped",
    )


def is_flat(layer: Any) -> bool:
    return hasattr(layer, "in_proj_qkv")
