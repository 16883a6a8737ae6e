"""Not native yet."""

from qwen3next_plugin.kernels.index_keys.reference import run

__all__ = ["run"]
