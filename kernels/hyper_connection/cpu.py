"""Not native yet."""

from qwen3next_plugin.kernels.hyper_connection.reference import run

__all__ = ["run"]
