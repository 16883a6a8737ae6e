"""Feed-forward blocks: SwiGLU, the shared expert's gate, and the router."""

from typing import Any

import torch
from torch import nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.fused_moe import SharedExpert, fused_moe
from qwen3next_plugin.kernels.linear.packed_weight import PANEL, PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed, normed
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.kernels.shared_expert_gate import shared_expert_gate
from qwen3next_plugin.kernels.sparse_moe import sparse_moe
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.projection import packed_weight, project


class SharedExpertGate(nn.Module):
    """σ(x·w) times the shared expert's output, in place.

    Not a layer of the host, because hosts pack their layers' weights and the op reads a plain one.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, size), requires_grad=False)

    def forward(
        self, x: torch.Tensor, shared_: torch.Tensor, routed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Gate `shared_` by x, and add the routed experts' output.

        Shapes:
            x, shared_, routed [T, D], returns shared_
        """
        shared_expert_gate(x=x, weight=self.weight, shared_=shared_, routed=routed)
        return shared_


class SwiGLU(nn.Module):
    """A dense MLP, or the shared expert, with its own sigmoid gate if that is given."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        layers: HostLayers,
        prefix: str,
        *,
        reduce_results: bool = True,
        expert_gate: SharedExpertGate | None = None,
    ) -> None:
        super().__init__()
        self.gate_up_proj = layers.merged_column_parallel(
            hidden_size, [intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = layers.row_parallel(
            intermediate_size,
            hidden_size,
            bias=False,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = layers.silu_and_mul()
        self.expert_gate = expert_gate

    def forward(
        self, x: torch.Tensor | Unnormed, routed: torch.Tensor | None = None
    ) -> torch.Tensor:
        """With a gate, the routed experts' output is added, and x must be normed already.

        Shapes: x, routed [T, D], returns [T, D]
        """
        (gate_up,) = project(x, self.gate_up_proj)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out if self.expert_gate is None else self.expert_gate(x, out, routed)

    def packed(self) -> SharedExpert | None:
        """The weights of a shared expert, for `fused_moe`; None where it cannot take them."""
        w13, w2 = packed_weight(self.gate_up_proj), packed_weight(self.down_proj)
        if self.expert_gate is None or w13 is None or w2 is None or w2.shape[-1] % PANEL:
            return None
        return SharedExpert(w13, w2, self.expert_gate.weight)


def make_shared_expert(
    config: Qwen3NextConfig, layers: HostLayers, prefix: str
) -> tuple[SharedExpertGate | None, SwiGLU | None]:
    """The shared expert's gate and the expert, unless the model has none.

    The gate comes first: a module names its parameters by the first attribute that holds them.
    """
    if not config.shared_expert_intermediate_size:
        return None, None
    gate = SharedExpertGate(config.hidden_size)
    expert = SwiGLU(
        config.hidden_size,
        config.shared_expert_intermediate_size,
        layers,
        prefix,
        reduce_results=False,  # reduced together with the routed experts
        expert_gate=gate,
    )
    return gate, expert


def packed_moe(
    x: torch.Tensor | Unnormed,
    *,
    gate: Any,
    w13: PackedWeight,
    w2: PackedWeight,
    shared_expert: SwiGLU | None,
    top_k: int,
    renormalise: bool,
    expert_map: torch.Tensor | None = None,
) -> torch.Tensor:
    """A mixture of packed experts: one op, if router and shared expert are packed as well.

    Args: gate: the router, a host layer; expert_map: given if this rank has only some experts.

    Shapes: x [T, D], returns [T, D]
    """
    router_weight = packed_weight(gate)
    shared = None if shared_expert is None else shared_expert.packed()
    whole = expert_map is None and (shared is None) == (shared_expert is None)
    if router_weight is not None and whole:
        return sparse_moe(
            x,
            router=router_weight,
            top_k=top_k,
            renormalise=renormalise,
            w13=w13,
            w2=w2,
            shared=shared,
        )
    x = normed(x)
    logits, _ = gate(x)
    weights, ids = router(logits=logits, top_k=top_k, renormalise=renormalise)
    ids = on_this_rank(ids, expert_map)
    out = fused_moe(x=x, w13=w13, w2=w2, topk_weights=weights, topk_ids=ids, shared=shared)
    return out if shared_expert is None or shared is not None else shared_expert(x, out)


def on_this_rank(topk_ids: torch.Tensor, expert_map: torch.Tensor | None) -> torch.Tensor:
    """A rank's own index of each expert; -1 for an expert that it lacks.

    Shapes: topk_ids [T, k], expert_map [experts of the model], -1 where the rank has none
    """
    return topk_ids.int() if expert_map is None else expert_map[topk_ids.long()].int()


def route(
    *, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router with the signature that both hosts expect of a routing function.

    Shapes:
        gating_output [T, E], returns weights [T, k] fp32, experts [T, k] int32
    """
    return router(logits=gating_output, top_k=topk, renormalise=renormalize)
