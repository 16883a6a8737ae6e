"""One layer's state pages and steps, for tests that drive the neutral model without an engine."""

from dataclasses import dataclass, field

import torch

from qwen3next_plugin.model.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    attend,
)
from qwen3next_plugin.model.state import PageLayout
from qwen3next_plugin.model.step import build_step


@dataclass
class LinearLayer:
    """A transformers Qwen3NextGatedDeltaNet driven through our pages."""

    module: torch.nn.Module
    slots: int = 4
    num_drafts: int = 2
    lengths: dict[int, int] = field(default_factory=dict)  # slot → tokens committed

    def __post_init__(self) -> None:
        m = self.module
        self.shape = GatedDeltaNetShape(m.num_k_heads, m.num_v_heads, m.head_k_dim, m.head_v_dim)
        dtype = m.in_proj_qkvz.weight.dtype
        layout = PageLayout(
            num_key_heads=m.num_k_heads,
            num_value_heads=m.num_v_heads,
            key_dim=m.head_k_dim,
            value_dim=m.head_v_dim,
            num_drafts=self.num_drafts,
            activation_dtype=dtype,
            state_dtype=torch.float32,
        )
        raw = torch.full((self.slots, layout.page_bytes), -1, dtype=torch.int8)  # NaN, bad spans
        self.raw, self.pool = raw, layout.view(raw)
        self.weights = GatedDeltaNetWeights(
            conv=m.conv1d.weight.squeeze(1),
            A_log=m.A_log.float(),
            dt_bias=m.dt_bias.float(),
            norm=m.norm.weight,
            norm_eps=m.layer_norm_epsilon,
        )

    @torch.inference_mode()
    def step(self, rows: dict[int, torch.Tensor], *, accepted: dict[int, int] | None = None):
        """One engine step: slot → hidden states [n, D]; returns slot → output [n, D].

        `accepted` says how many of a row's tokens are committed afterwards (all, if not said).
        """
        counts = [len(x) for x in rows.values()]
        hidden = torch.cat(list(rows.values()))
        context = [self.lengths.get(slot, 0) for slot in rows]
        step = build_step(
            query_start_loc=torch.tensor([0, *counts]).cumsum(0),
            seq_lens=torch.tensor([c + n for c, n in zip(context, counts, strict=True)]),
            slot=torch.tensor(list(rows)),
            num_tokens=len(hidden),
            num_slots=self.slots,
            max_query_len=max(counts),
        )
        core = attend(
            qkvz=self.module.in_proj_qkvz(hidden),
            ba=self.module.in_proj_ba(hidden),
            weights=self.weights,
            shape=self.shape,
            pool_=self.pool,
            step=step,
        )
        for slot, c, n in zip(rows, context, counts, strict=True):
            self.lengths[slot] = c + (accepted or {}).get(slot, n)
        return dict(zip(rows, self.module.out_proj(core).split(counts), strict=True))
