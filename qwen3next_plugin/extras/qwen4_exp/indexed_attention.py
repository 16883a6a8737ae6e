"""Sparse attention: gated attention that reads only the blocks of tokens that an indexer chooses.

Up to `indexer_budget` tokens these are all blocks, so it is full attention.
"""

from math import ceil
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.kernels.index_keys import index_keys
from qwen3next_plugin.kernels.paged_attention import paged_attention
from qwen3next_plugin.kernels.rms_norm import Unnormed
from qwen3next_plugin.kernels.select_blocks import select_blocks
from qwen3next_plugin.model.attention import GatedAttention, apply_gate, prepare
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.linear_attention import Weight
from qwen3next_plugin.model.projection import project


class Indexer(nn.Module):
    """The projection to queries and a key, and their norms; every rank has all of it."""

    def __init__(self, config: Qwen4ExpConfig, layers: HostLayers, prefix: str) -> None:
        super().__init__()
        dim = config.indexer_head_dim
        self.index_qk_proj = layers.replicated(
            config.hidden_size,
            (config.indexer_n_heads + config.indexer_kv_heads) * dim,
            bias=False,
            prefix=f"{prefix}.index_qk_proj",
        )
        self.q_layernorm = Weight(dim)
        self.k_layernorm = Weight(dim)


class IndexedAttention(GatedAttention):
    """Gated attention with an indexer; `attn` takes what the indexer projects besides q, k and v.

    For texts: positions are those in the sequence.
    """

    def __init__(
        self, config: Qwen4ExpConfig, layers: HostLayers, prefix: str, *, attn: nn.Module
    ) -> None:
        super().__init__(config, layers, prefix, attn=attn)
        self.indexer = Indexer(config, layers, f"{prefix}.indexer")

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor | Unnormed, *batch: Any
    ) -> torch.Tensor:
        """Shapes: positions [T], x [T, D], returns [T, D]."""
        qkv, index_qk = project(x, self.qkv_proj, self.indexer.index_qk_proj)
        q, k, v, gate = prepare(
            qkv=qkv,
            q_weight=self.q_norm.weight,
            k_weight=self.k_norm.weight,
            cos_sin=self.cos_sin,
            positions=positions,
            shape=self.shape,
            eps=self.eps,
        )
        norms = self.indexer.q_layernorm.weight, self.indexer.k_layernorm.weight
        attended = self.attn(q, k, v, index_qk, *norms, self.cos_sin, positions, *batch)
        output, _ = self.o_proj(apply_gate(attended, gate))
        return output


class BlockRule(NamedTuple):
    """How the indexer chooses."""

    block_size: int  # tokens of a block
    top_k: int  # blocks of a query, at most
    eps: float

    @classmethod
    def from_config(cls, config: Qwen4ExpConfig) -> Self:
        size = config.indexer_compress_ratio
        return cls(size, config.indexer_budget // size, config.rms_norm_eps)


class Caches(NamedTuple):
    """Views of the pages of a layer, P tokens each.

    A page has its tokens' keys, their values, their index keys, and the keys of its blocks. A copy
    of it is a correct one. What rejected drafts wrote is written again before it is read.

    Shapes: key, value [pages, P, Hkv, D], index_key [pages, P, d]
        block_key [pages, P / block_size, d]; or, of pages of one token, all without the second dim
    """

    key: torch.Tensor
    value: torch.Tensor
    index_key: torch.Tensor
    block_key: torch.Tensor

    @classmethod
    def view(
        cls, pages: torch.Tensor, *, P: int, heads: int, dims: int, index_dims: int, block_size: int
    ) -> Self:
        """Shapes: pages [pages, elements], the last ones unused."""
        n, kv, index = len(pages), 2 * P * heads * dims, P * index_dims
        block = index // block_size
        key, value = pages[:, :kv].view(n, 2, P, heads, dims).unbind(1)
        return cls(
            key,
            value,
            pages[:, kv : kv + index].view(n, P, index_dims),
            pages[:, kv + index : kv + index + block].view(n, -1, index_dims),
        )

    @classmethod
    def of_tokens(
        cls, keys: torch.Tensor, values: torch.Tensor, *, heads: int, dims: int, index_dims: int
    ) -> Self:
        """Of pages of one token. Its index key is beside its keys, a block's beside its values.

        A block's key is in the page of its last token.

        Shapes: keys, values [pages, elements], the last ones unused
        """
        kv = heads * dims
        index = slice(kv, kv + index_dims)
        shape = len(keys), heads, dims
        return cls(
            keys[:, :kv].view(shape), values[:, :kv].view(shape), keys[:, index], values[:, index]
        )


def dims_of_tokens(config: Qwen4ExpConfig) -> int:
    """Elements of a KV head in a page of one token: head_dim, plus its part of an index key."""
    return config.head_dim + ceil(config.indexer_head_dim / config.num_key_value_heads_per_rank)


def index_elements(config: Qwen4ExpConfig) -> int:
    """Of a page, for each token and key-value head: what the indexer keeps of a token."""
    size = config.indexer_compress_ratio
    of_token = config.indexer_head_dim * (size + 1) / size
    return ceil(of_token / config.num_key_value_heads_per_rank)


class Tokens(NamedTuple):
    """The step's tokens in the paged caches.

    Shapes: slots [T], pages · P + where in a page; the others as of `paged_attention`
    """

    slots: torch.Tensor
    token_table: torch.Tensor
    table_row: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


def attend(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_qk: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    caches_: Caches,
    tokens: Tokens,
    scale: float,
    rule: BlockRule,
) -> torch.Tensor:
    """Keep the tokens' keys and values, choose blocks for each, and attend to them.

    Shapes: q [T, Hq, D], k, v [T, Hkv, D], index_qk [T, (Hi + 1)·d], returns [T, Hq, D]
    """
    at: tuple[torch.Tensor, ...] = (tokens.slots,)
    if caches_.key.dim() == 4:
        P = caches_.key.shape[1]
        at = (tokens.slots // P, tokens.slots % P)
    caches_.key[at] = k
    caches_.value[at] = v
    rows = {
        "token_table": tokens.token_table,
        "table_row": tokens.table_row,
        "query_start_loc": tokens.query_start_loc,
        "seq_lens": tokens.seq_lens,
    }
    index_q = index_keys(
        qk=index_qk,
        q_weight=q_weight,
        k_weight=k_weight,
        cos_sin=cos_sin,
        positions=positions,
        block_positions=positions - positions % rule.block_size,
        key_cache_=caches_.index_key,
        block_cache_=caches_.block_key,
        block_size=rule.block_size,
        eps=rule.eps,
        **rows,
    )
    selection = None
    if int(tokens.seq_lens.max()) // rule.block_size > rule.top_k:  # else all blocks are chosen
        selection = select_blocks(
            q=index_q,
            block_cache=caches_.block_key,
            block_size=rule.block_size,
            top_k=rule.top_k,
            **rows,
        )
    return paged_attention(
        q=q,
        key_cache=caches_.key,
        value_cache=caches_.value,
        scale=scale,
        selection=selection,
        **rows,
    )
