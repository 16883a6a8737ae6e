"""Packing of the vocabulary layers on a CPU, without the second copies that vLLM keeps.

vLLM packs a matrix-product copy of each vocabulary layer's weight and keeps the plain weight too.
An embedding is only looked up and needs no packed copy; a head is only multiplied and needs no
plain one. With a vocabulary of 151,936 and 2048 dims that saves 1.2 GB. On other devices nothing
is packed and these methods change nothing.
"""

from typing import TYPE_CHECKING

from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform

if TYPE_CHECKING:
    from qwen3next_plugin.engines.vllm.model.vocabulary import LMHead


class PlainEmbedding(UnquantizedEmbeddingMethod):
    """vLLM's unquantised embedding, never packed."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Pack nothing."""


class PackedHead(UnquantizedEmbeddingMethod):
    """vLLM's unquantised head; the plain weight is kept only if it is the embedding too."""

    def __init__(self, *, tied: bool, drafts: bool) -> None:
        self.tied, self.drafts = tied, drafts

    def process_weights_after_loading(self, layer: "LMHead") -> None:
        if not current_platform.is_cpu():
            return
        if self.drafts:
            layer.make_draft_head()
        dispatch_cpu_unquantized_gemm(layer, remove_weight=not self.tied)
