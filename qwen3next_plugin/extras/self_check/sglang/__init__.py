"""The check under SGLang, as under any engine."""

from qwen3next_plugin.extras.self_check import ADDS

__all__ = ["ADDS"]
