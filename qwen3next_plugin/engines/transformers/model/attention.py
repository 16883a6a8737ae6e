"""Gated attention around the keys and values of a speculating batch's cache."""

from torch import Tensor, nn

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.transformers.model.host_layers import host_layers
from qwen3next_plugin.engines.transformers.state.cache import RowCache
from qwen3next_plugin.engines.transformers.state.rows import Rows
from qwen3next_plugin.model.attention import GatedAttention


class Attention(nn.Module):
    """Attention of one layer, by our kernel."""

    def __init__(self, config: Qwen3NextConfig, index: int) -> None:
        super().__init__()
        self.head_dim, self.index = config.head_dim, index

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rows: Rows, cache: RowCache) -> Tensor:
        """Shapes: q [T, Hq·D], k, v [T, Hkv·D], returns [T, Hq·D]"""
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        attended = cache.layers[self.index].attend(q, k, v, rows, self.head_dim**-0.5)
        return attended.flatten(1)


def make_attention(config: Qwen3NextConfig, of_host: nn.Module, index: int) -> GatedAttention:
    """The neutral layer, from the host's projections."""
    attn = Attention(config, index)
    return GatedAttention(config, host_layers(of_host), "self_attn", attn=attn)
