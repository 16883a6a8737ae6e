"""Embedding and output head, from vLLM's vocabulary layers, without second copies.

On a CPU vLLM packs a matrix-product copy of each vocabulary layer's weight and keeps the plain
weight too. An embedding is only looked up and needs no packed copy; a head is only multiplied and
needs no plain one. With a vocabulary of 151,936 and 2048 dims that saves 1.2 GB. On other devices
nothing is packed.
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
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.model.quantisation.layers import HeadMethod
from qwen3next_plugin.model.quantisation.modules import served_formats
from qwen3next_plugin.model.quantisation.packing import (
    Packed,
    drop_plain,
    pack_plain,
    packs,
    plain_as_int8,
)
from qwen3next_plugin.model.quantisation.stacked import HEAD_MODULE
from qwen3next_plugin.mtp.draft_head import DraftHead


class LMHead(ParallelLMHead):
    """The output head and, with MTP on a CPU, the int8 draft head."""

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
        """Draft by an int8 copy of the weight; a packed weight stays, so it is read instead."""
        shard = self.shard_indices
        self.draft_head = DraftHead(
            self.weight.data if self.packed is None else self.packed.weight,
            stays=stays,
            first=shard.org_vocab_start_index,
            end=shard.org_vocab_end_index,
            vocab_size=self.org_vocab_size,
            ranks=get_tp_group(),
        )


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """vLLM's unquantised embedding, never packed."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack nothing."""


class PackedHead(HeadMethod, UnquantizedEmbeddingMethod):
    """vLLM's unquantised head; the plain weight is kept only if it is the embedding too."""

    def __init__(self, *, tied: bool, drafts: bool, as_int8: bool, in_files: bool) -> None:
        """Args: in_files: the files have it packed."""
        self.tied, self.drafts, self.as_int8, self.in_files = tied, drafts, as_int8, in_files

    def process_weights_after_loading(self, layer: LMHead) -> None:
        if not current_platform.is_cpu():
            return
        ours = packs(layer.weight.dtype, as_int8=self.as_int8)
        if ours and not self.in_files:  # also where vLLM has loaded it again
            layer.packed = pack_plain(layer.weight.data, as_int8=self.as_int8)
        if self.drafts:
            layer.make_draft_head(stays=ours or self.tied)
        if not ours:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.tied)
        elif not self.tied:
            drop_plain(layer)

    def apply(
        self, layer: LMHead, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if layer.packed is None:
            return super().apply(layer, x, bias)
        return layer.packed(x, bias, out_dtype=torch.float32)


@override(
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding.quant_method",
    reason="on a CPU vLLM keeps a packed copy of the vocabulary's weight and the plain one; an "
    "embedding needs only the plain one, a head only the packed one",
    remove_when="vLLM keeps only the copy that a layer uses",
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
        formats = served_formats(vllm_config.quant_config)
        head.quant_method = PackedHead(
            tied=config.tie_word_embeddings,
            drafts=vllm_config.speculative_config is not None,
            as_int8=plain_as_int8(formats),
            in_files=formats is not None and HEAD_MODULE in formats.packed_plain,
        )
    return head.tie_weights(embedding) if config.tie_word_embeddings else head
