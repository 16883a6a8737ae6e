"""The fixtures of transformers' tests."""

from engines.transformers.conftest import _registered, made, steps

__all__ = ["_registered", "made", "steps"]
