"""Embedding, output head and logits, from SGLang's vocabulary layers."""

from typing import Any

from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.sglang.cpu.environment import without_gpu
from qwen3next_plugin.engines.sglang.cpu.quantisation import PackedLogitsProcessor


def make_embedding(config: Qwen3NextConfig) -> VocabParallelEmbedding:
    """The input embedding."""
    return VocabParallelEmbedding(config.vocab_size, config.hidden_size)


def make_lm_head(
    config: Qwen3NextConfig,
    quant_config: QuantizationConfig | None,
    embedding: VocabParallelEmbedding,
) -> ParallelLMHead | VocabParallelEmbedding:
    """The output head; it is the embedding itself if they are tied."""
    if config.tie_word_embeddings:
        return embedding
    return ParallelLMHead(config.vocab_size, config.hidden_size, quant_config=quant_config)


@override(
    "sglang.srt.layers.logprob_processor.InputLogprobProcessor.enable_fast_input_logprobs",
    reason="SGLang sums a prompt token's probabilities in another order than a sampled one's",
    remove_when="SGLang's log-probabilities have one order",
)
def make_logits_processor(hf_config: Any) -> LogitsProcessor:
    """SGLang's; on a CPU the one that multiplies by a packed head."""
    text = hf_config.get_text_config()  # of a wrapper; a text model's own
    if not without_gpu():
        return LogitsProcessor(text)
    processor = PackedLogitsProcessor(text)
    if env.batch_invariant():  # a prompt's log-probabilities, too, by PyTorch's own operator
        processor.input_logprob_processor.enable_fast_input_logprobs = False
    return processor
