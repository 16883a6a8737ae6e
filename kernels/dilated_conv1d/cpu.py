"""Not native yet."""

from qwen3next_plugin.kernels.dilated_conv1d.reference import run

__all__ = ["run"]
