"""Embedding and output head, from vLLM's vocabulary layers."""

from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import PPMissingLayer, maybe_prefix

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.cpu.packing import PackedHead, PlainEmbedding
from qwen3next_plugin.model.packed import Packed
from qwen3next_plugin.mtp.draft_head import DraftHead


class LMHead(ParallelLMHead):
    """The output head and, with MTP on a CPU, the int8 rows of it that drafts choose from."""

    def __init__(self, config: Qwen3NextConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.draft_head: DraftHead | None = None
        self.packed: Packed | None = None  # for our kernel

    def make_draft_head(self, *, stays: bool) -> None:
        """Draft by int8 rows of the weight: the packed one if there is one, which stays."""
        shard = self.shard_indices
        self.draft_head = DraftHead(
            self.weight.data if self.packed is None else self.packed.weight,
            stays=stays,
            first=shard.org_vocab_start_index,
            end=shard.org_vocab_end_index,
            vocab_size=self.org_vocab_size,
            ranks=get_tp_group(),
        )


def make_embedding(config: Qwen3NextConfig) -> VocabParallelEmbedding:
    """The input embedding."""
    embedding = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
    embedding.quant_method = PlainEmbedding()
    return embedding


def make_lm_head(
    config: Qwen3NextConfig,
    vllm_config: VllmConfig,
    prefix: str,
    embedding: VocabParallelEmbedding,
) -> nn.Module:
    """The output head of the last stage; it shares the embedding's weight if they are tied."""
    if not get_pp_group().is_last_rank:
        return PPMissingLayer()
    head = LMHead(config, vllm_config, maybe_prefix(prefix, "lm_head"))
    if isinstance(head.quant_method, UnquantizedEmbeddingMethod):
        head.quant_method = PackedHead(
            tied=config.tie_word_embeddings,
            drafts=vllm_config.speculative_config is not None,
        )
    return head.tie_weights(embedding) if config.tie_word_embeddings else head
