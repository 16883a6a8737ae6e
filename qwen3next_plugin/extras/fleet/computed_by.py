"""All that the bits of pages and KV depend on, besides weights, dtypes and layouts."""

from hashlib import sha256
from typing import Any

import torch

from qwen3next_plugin import __version__, env
from qwen3next_plugin.kernels.dispatch import described
from qwen3next_plugin.machine.processor import instructions
from qwen3next_plugin.model.state import PAGE_FORMAT


def computed_by(hf_config: Any, host: str) -> tuple[Any, ...]:
    """The model's sizes, our settings, all versions, kernels and the processor.

    Args: host: the engine's version.
    """
    fields = hf_config.to_dict().items()
    return (
        # The path does not matter: a copy of a model is the same model.
        sorted((field for field in fields if field[0] != "_name_or_path"), key=str),
        (env.quantise(), env.head(), env.batch_invariant()),
        (PAGE_FORMAT, __version__, host, str(torch.__version__), described("cpu"), instructions()),
    )


def digest(found: Any) -> str:
    """A short hash of these values."""
    return sha256(repr(found).encode()).hexdigest()[:16]
