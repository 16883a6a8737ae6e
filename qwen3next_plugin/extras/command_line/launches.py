"""Launch every kernel of a model once, to compile them before they are needed."""

from dataclasses import dataclass

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.copy_pages import copy_pages
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.model.attention import AttentionShape, apply_gate, prepare
from qwen3next_plugin.model.gated_delta_net import (
    GatedDeltaNetWeights,
    launch_idle,
    shape_of,
)
from qwen3next_plugin.model.moe import SharedExpertGate
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.state import PageLayout
from qwen3next_plugin.model.step import NULL_SLOT


@dataclass(frozen=True, slots=True)
class Launches:
    """One rank's share of a model, with the dtypes and draft length that it is served with."""

    config: Qwen3NextConfig
    dtype: torch.dtype
    state_dtype: torch.dtype
    num_drafts: int
    device: torch.device

    @torch.inference_mode()
    def run(self) -> None:
        """Launch each kernel on zeros, with rows that have no page."""
        self._linear_attention()
        self._copies()
        self._attention()
        self._norms()
        self._moe()

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def page_layout(self) -> PageLayout:
        """A page of a linear layer."""
        return PageLayout.from_config(
            self.config,
            num_drafts=self.num_drafts,
            activation_dtype=self.dtype,
            state_dtype=self.state_dtype,
        )

    def _linear_attention(self) -> None:
        layout, empty = self.page_layout(), self._empty
        HV = layout.num_value_heads
        launch_idle(
            weights=GatedDeltaNetWeights(
                conv=empty(layout.conv_dim, 4),
                A_log=empty(HV, dtype=torch.float32),
                dt_bias=empty(HV, dtype=torch.float32),
                norm=empty(layout.value_dim),
                norm_eps=self.config.rms_norm_eps,
            ),
            shape=shape_of(self.config),
            pool_=layout.spare_pool(self.device),
        )

    def _copies(self) -> None:
        null = torch.full((1,), NULL_SLOT, dtype=torch.int32, device=self.device)
        copy_pages(
            pages_=self._empty(1, 1, 8, dtype=torch.uint8),
            source=null,
            target=null.long(),
            mask=null == NULL_SLOT,
        )

    def _attention(self) -> None:
        c, empty = self.config, self._empty
        shape, D = AttentionShape.from_config(c), c.head_dim
        q, *_, gate = prepare(
            qkv=empty(1, 2 * (shape.num_heads + shape.num_kv_heads) * D),
            q_weight=empty(D),
            k_weight=empty(D),
            cos_sin=empty(1, c.rotary_dim),
            positions=empty(1, dtype=torch.int64),
            shape=shape,
            eps=c.rms_norm_eps,
        )
        apply_gate(q, gate)

    def _norms(self) -> None:
        D = self.config.hidden_size
        norm = RMSNorm(D, self.config.rms_norm_eps).to(self.device, self.dtype)
        norm(self._empty(1, D))
        norm(self._empty(1, D), self._empty(1, D))

    def _moe(self) -> None:
        c, x = self.config, self._empty(1, self.config.hidden_size)
        if not c.num_experts:
            return
        router(  # not used by a host that has its own
            logits=self._empty(1, c.num_experts),
            top_k=c.num_experts_per_tok,
            renormalise=c.norm_topk_prob,
        )
        if c.shared_expert_intermediate_size:
            gate = SharedExpertGate(c.hidden_size).to(self.device, self.dtype)
            gate(x, x.clone())
            gate(x, x.clone(), x)
