"""Not native yet."""

from qwen3next_plugin.kernels.select_blocks.reference import run

__all__ = ["run"]
