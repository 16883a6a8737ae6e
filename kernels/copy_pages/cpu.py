"""On a CPU PyTorch's indexed copy already runs at the speed of memory."""

from qwen3next_plugin.kernels.copy_pages.reference import run

__all__ = ["run"]
