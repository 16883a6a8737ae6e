"""Not native yet."""

from qwen3next_plugin.kernels.ple_gate.reference import run

__all__ = ["run"]
