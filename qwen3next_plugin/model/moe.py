"""Feed-forward blocks: SwiGLU, the shared expert's gate, and the router."""

from typing import Any, NamedTuple, Self

import torch
from torch import nn

from qwen3next_plugin.kernels.fused_moe import SharedExpert
from qwen3next_plugin.kernels.linear.packed_weight import PANEL, PackedWeight
from qwen3next_plugin.kernels.rms_norm import Unnormed
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


class PackedMoE(NamedTuple):
    """The weights of a mixture of experts that one op computes, from router to shared expert."""

    gate: PackedWeight
    w13: PackedWeight
    w2: PackedWeight
    shared: SharedExpert | None

    @classmethod
    def of(
        cls, gate: Any, w13: PackedWeight, w2: PackedWeight, shared_expert: SwiGLU | None
    ) -> Self | None:
        """The weights, or None if the router or the shared expert is not packed.

        Args: gate: the host's layer.
        """
        router_weight = packed_weight(gate)
        shared = None if shared_expert is None else shared_expert.packed()
        if router_weight is None or (shared is None) != (shared_expert is None):
            return None
        return cls(router_weight, w13, w2, shared)

    def __call__(
        self, x: torch.Tensor | Unnormed, *, top_k: int, renormalise: bool
    ) -> torch.Tensor:
        """Shapes: x [T, D], returns [T, D]."""
        return sparse_moe(x, top_k=top_k, renormalise=renormalise, **self._asdict())


def route(
    *, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The router with the signature that both hosts expect of a routing function.

    Shapes:
        gating_output [T, E], returns weights [T, k] fp32, experts [T, k] int32
    """
    return router(logits=gating_output, top_k=topk, renormalise=renormalize)
