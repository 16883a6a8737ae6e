"""Not native yet."""

from qwen3next_plugin.kernels.ngram_embedding.reference import run

__all__ = ["run"]
