"""The layer on a CPU."""

from qwen3next_plugin.kernels.linear.reference import run

__all__ = ["run"]  # the native kernel comes next
