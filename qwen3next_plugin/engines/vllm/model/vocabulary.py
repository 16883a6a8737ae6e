"""Embedding and output head, without the second copies that vLLM keeps on a CPU.

vLLM packs a GEMM copy of every vocabulary layer's weight and keeps the plain one beside it. An
embedding is only looked up and needs no packed copy; a head is only multiplied and needs no plain
one. With a vocabulary of 151,936 that is 1.2 GB at 2048 dims. Elsewhere than on a CPU nothing is
packed and nothing changes.
"""

from typing import Any

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
from qwen3next_plugin.mtp.draft_head import DraftHead


class _LookUpOnly(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack nothing."""


class _Head(UnquantizedEmbeddingMethod):
    """Packs the head; keeps a plain copy only where it is the embedding too."""

    def __init__(self, vocab_size: int, *, tied: bool, drafts: bool) -> None:
        self.vocab_size, self.tied, self.drafts = vocab_size, tied, drafts

    def process_weights_after_loading(self, layer: Any) -> None:
        if not current_platform.is_cpu():
            return
        if self.drafts:
            shard = layer.shard_indices
            layer.draft_head = DraftHead(
                layer.weight.data,
                first=shard.org_vocab_start_index,
                end=shard.org_vocab_end_index,
                vocab_size=self.vocab_size,
                ranks=get_tp_group(),
            )
        dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.tied)


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
