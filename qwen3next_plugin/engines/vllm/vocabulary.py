"""Embedding, output head and draft head, without the second copies that vLLM keeps on a CPU.

vLLM packs a GEMM copy of every vocabulary layer's weight and keeps the plain one beside it. An
embedding is only looked up and needs no packed copy; a head is only multiplied and needs no plain
one. With a vocabulary of 151,936 that is 1.2 GB at 2048 dims. Elsewhere than on a CPU nothing is
packed and nothing changes.

The draft head is an int8 copy of the head, of which a draft asks the likelier rows: it needs one
token, not a distribution, and what it gets wrong the full head puts right at verification.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix
from vllm.platforms import current_platform

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.draft_head import draft_head, quantise_rows
from qwen3next_plugin.mtp.costs import DRAFTED
from qwen3next_plugin.mtp.draft_vocabulary import DraftVocabulary


class _LookUpOnly(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack nothing."""


class _Head(UnquantizedEmbeddingMethod):
    """Packs the head; keeps a plain copy only where it is the embedding too."""

    def __init__(self, vocab_size: int, *, tied: bool, drafts: bool) -> None:
        self.vocab_size, self.tied, self.drafts = vocab_size, tied, drafts

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        if not current_platform.is_cpu():
            return
        if self.drafts:
            layer.draft_head = DraftHead(layer, self.vocab_size)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.tied)


class DraftHead(nn.Module):
    """This rank's share of the head that drafts choose from."""

    def __init__(self, head: ParallelLMHead, vocab_size: int) -> None:
        super().__init__()
        shard = head.shard_indices
        self.first, self.end = shard.org_vocab_start_index, shard.org_vocab_end_index
        self.weight, self.scale = quantise_rows(head.weight.data[: self.end - self.first])
        self.vocabulary = DraftVocabulary(vocab_size, DRAFTED)
        self.rows = self._rows()

    def _rows(self) -> torch.Tensor:
        """The drafted tokens that this rank holds, as rows of its weight [R] int32."""
        ids = self.vocabulary.ids
        return ids[(ids >= self.first) & (ids < self.end)] - self.first

    def see(self, token_ids: torch.Tensor) -> None:
        """Let drafts follow what is asked and answered. Shapes: token_ids [T]."""
        if self.vocabulary.see(token_ids):
            self.rows = self._rows()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The likeliest token of each. Shapes: hidden_states [N, D], returns [N]."""
        if len(self.rows):
            rows, values = draft_head(
                x=hidden_states, weight=self.weight, scale=self.scale, rows=self.rows
            )
            tokens = rows + self.first
        else:  # a rank all of whose rows are unlikely tokens
            values = hidden_states.new_full((len(hidden_states),), -torch.inf, dtype=torch.float32)
            tokens = torch.zeros(len(hidden_states), dtype=torch.int64)
        group = get_tp_group()
        if group.world_size == 1:
            return tokens
        # fp32, in which ids to 2^24 are exact: vLLM's gather in shared memory knows no fp64
        pairs = torch.stack([values.float(), tokens.float()], dim=-1)[:, None]
        pairs = group.all_gather(pairs, dim=1)  # [N, ranks, 2]
        best = pairs[..., 0].argmax(dim=1, keepdim=True)
        return pairs[..., 1].gather(1, best).squeeze(1).long()


def make_embedding(config: Qwen3NextConfig) -> VocabParallelEmbedding:
    """The input embedding."""
    embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
    embedding.quant_method = _LookUpOnly()
    return embedding


def make_lm_head(
    config: Qwen3NextConfig,
    vllm_config: VllmConfig,
    prefix: str,
    embedding: VocabParallelEmbedding,
) -> nn.Module:
    """The output head of the last stage; it shares the embedding's weight where they are tied."""
    if not get_pp_group().is_last_rank:
        return PPMissingLayer()
    head = ParallelLMHead(
        config.vocab_size,
        config.hidden_size,
        quant_config=vllm_config.quant_config,
        prefix=maybe_prefix(prefix, "lm_head"),
    )
    if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        head.quant_method = _Head(
            config.vocab_size,
            tied=config.tie_word_embeddings,
            drafts=vllm_config.speculative_config is not None,
        )
    return head.tie_weights(embedding) if config.tie_word_embeddings else head
