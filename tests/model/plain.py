"""A host's layers for tests without a host: plain torch, one rank."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qwen3next_plugin.model.host_layers import HostLayers


class Projection(nn.Linear):
    """Returns its output and no bias, as a host's does."""

    def __init__(self, D: int, outputs: int | Sequence[int], *, bias: bool, **_: Any) -> None:
        super().__init__(D, outputs if isinstance(outputs, int) else sum(outputs), bias=bias)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return super().forward(x), None


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def _qkv(D: int, head_dim: int, heads: int, kv_heads: int, **options: Any) -> Projection:
    return Projection(D, (heads + 2 * kv_heads) * head_dim, **options)


PLAIN = HostLayers(
    column_parallel=Projection,
    merged_column_parallel=Projection,
    qkv_parallel=_qkv,
    row_parallel=Projection,
    replicated=Projection,
    silu_and_mul=SiluAndMul,
)


def stacked(state: dict[str, torch.Tensor], whole: str, parts: Sequence[str]) -> dict:
    """A checkpoint's tensors with some projections in one, as our parameters are."""
    found = {name: x for name, x in state.items() if name.partition(".")[0] not in parts}
    for kind in {name.partition(".")[2] for name in state.keys() - found.keys()}:
        found[f"{whole}.{kind}"] = torch.cat([state[f"{part}.{kind}"] for part in parts])
    return found
