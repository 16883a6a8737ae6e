"""On a CPU PyTorch copies pages as fast as the memory does."""

from qwen3next_plugin.kernels.copy_pages.reference import run

__all__ = ["run"]
