"""A decode step's sparse attention, with its indexer, against full attention."""

import itertools
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.block_model import RELEASED
from benchmarks.kernels.timing import PAIRS, TOLERANCE, relative_error, seconds
from benchmarks.qwen4.model import SIZE
from benchmarks.report import RedCheckError
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.extras.qwen4_exp.indexed_attention import BlockRule, Caches, Tokens, attend
from qwen3next_plugin.kernels.index_keys import index_keys
from qwen3next_plugin.kernels.paged_attention import paged_attention
from qwen3next_plugin.kernels.select_blocks import reference, select_blocks
from qwen3next_plugin.machine.huge_pages import use_huge_pages
from qwen3next_plugin.model.rotary import rotary_table

CONTEXT, PAGE, LAYERS, DTYPE = 32_768, 64, 4, torch.bfloat16


class Layer:
    """One layer's pages of random keys, and a decode step's token at the context's end."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        Hq, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        Hi, d = config.indexer_n_heads, config.indexer_head_dim
        self.rule, self.scale = BlockRule.from_config(config), D**-0.5
        size = self.rule.block_size
        elements = 2 * PAGE * Hkv * D + PAGE * d + PAGE // size * d
        pages = torch.empty(CONTEXT // PAGE, elements, dtype=DTYPE).normal_()
        self.caches = Caches.view(pages, P=PAGE, heads=Hkv, dims=D, index_dims=d, block_size=size)
        self.rows: dict[str, Any] = {
            "token_table": torch.arange(CONTEXT // PAGE, dtype=torch.int32)[None],
            "table_row": torch.tensor([0], dtype=torch.int32),
            "query_start_loc": torch.tensor([0, 1], dtype=torch.int32),
            "seq_lens": torch.tensor([CONTEXT], dtype=torch.int32),
        }
        self.positions = torch.tensor([CONTEXT - 1])
        self.q, self.k, self.v = (torch.randn(1, n, D).to(DTYPE) for n in (Hq, Hkv, Hkv))
        self.indexer = {
            "q_weight": torch.randn(d).mul_(0.1).to(DTYPE),
            "k_weight": torch.randn(d).mul_(0.1).to(DTYPE),
            "cos_sin": rotary_table(config)[:CONTEXT],
        }
        self.index_qk = torch.randn(1, (Hi + 1) * d).to(DTYPE)

    def sparse(self, rule: BlockRule | None = None) -> Tensor:
        """The layer as the model calls it."""
        return attend(
            q=self.q, k=self.k, v=self.v, index_qk=self.index_qk, **self.indexer,
            positions=self.positions, caches_=self.caches,
            tokens=Tokens(self.positions, **self.rows), scale=self.scale, rule=rule or self.rule,
        )  # fmt: skip

    def full(self) -> Tensor:
        """Attention to all tokens, without an indexer."""
        return paged_attention(
            q=self.q, key_cache=self.caches.key, value_cache=self.caches.value, scale=self.scale,
            **self.rows,
        )  # fmt: skip

    def check(self) -> None:
        """Raise unless all blocks are full attention, and fewer are those of the definition."""
        everything = self.rule._replace(top_k=CONTEXT // self.rule.block_size)
        if not torch.equal(self.sparse(everything), self.full()):
            raise RedCheckError("sparse attention to all blocks is not full attention")
        error = relative_error(self.sparse(), self._defined())
        if not error <= TOLERANCE:
            raise RedCheckError(f"sparse attention is {error:.1e} from its definition")

    def _defined(self) -> Tensor:
        """Attention in fp32 to the tokens of the blocks that the reference chooses."""
        size = self.rule.block_size
        index_q = index_keys(
            qk=self.index_qk, **self.indexer, positions=self.positions,
            block_positions=self.positions - self.positions % size,
            key_cache_=self.caches.index_key, block_cache_=self.caches.block_key,
            block_size=size, eps=self.rule.eps, **self.rows,
        )  # fmt: skip
        asked = {"q": index_q, "block_cache": self.caches.block_key, "block_size": size}
        asked |= {"top_k": self.rule.top_k} | self.rows
        blocks, tail = reference.run(**asked)
        if not torch.equal(select_blocks(**asked)[0], blocks):
            raise RedCheckError("other blocks are selected than the definition's")
        chosen = (blocks[0, :, None] * size + torch.arange(size)).flatten()
        chosen = torch.cat([chosen, torch.arange(int(tail), CONTEXT)])
        k, v = (t.flatten(0, 1)[chosen].float() for t in (self.caches.key, self.caches.value))
        groups = self.q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))  # [chosen, Hq, D]
        weights = torch.einsum("hd,nhd->hn", self.q[0].float(), k).mul_(self.scale).softmax(-1)
        return torch.einsum("hn,nhd->hd", weights, v)[None]


def sparse_over_full() -> dict[str, float]:
    """Microseconds of both, and the median of the ratios of their pairs."""
    use_huge_pages()
    torch.manual_seed(0)
    config = Qwen3NextConfig.from_hf(read_config(RELEASED / SIZE))
    layers = [Layer(config) for _ in range(LAYERS)]
    for layer in layers:
        layer.check()
    sparse, full = itertools.cycle(layers), itertools.cycle(layers)
    ours, theirs = [], []
    for _ in range(PAIRS):
        ours.append(seconds(lambda: next(sparse).sparse(), LAYERS))
        theirs.append(seconds(lambda: next(full).full(), LAYERS))
    return {
        "full": statistics.median(theirs) * 1e6,
        "sparse": statistics.median(ours) * 1e6,
        "sparse / full": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }
