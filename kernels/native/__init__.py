"""Loads the native kernels and chooses their instruction set."""

import functools
from pathlib import Path

import torch

import qwen3next_plugin.kernels
from qwen3next_plugin import env

LIBRARY = "_ops.so"


@functools.cache
def load() -> None:
    """Load the library and apply QWEN3NEXT_ISA, once.

    Raises: ImportError if it was not built, EnvError if the machine lacks the instruction set.
    """
    # An editable install keeps the library in site-packages and the sources in the checkout.
    folders = [Path(folder) for folder in qwen3next_plugin.kernels.__path__]
    path = next((f / LIBRARY for f in folders if (f / LIBRARY).exists()), None)
    if path is None:
        raise ImportError(
            f"the native kernels are not built ({LIBRARY} is in none of"
            f" {', '.join(map(str, folders))}): reinstall qwen3next-plugin with a C++ compiler"
            " (pip install --force-reinstall --no-deps qwen3next-plugin), or set"
            " QWEN3NEXT_KERNELS=reference"
        )
    torch.ops.load_library(path)
    if (name := env.isa()) is not None:
        if name not in (available := _levels()):
            raise env.EnvError(
                f"QWEN3NEXT_ISA={name}: this processor runs {', '.join(available)}; use one of "
                f"these, or unset it"
            )
        torch.ops.qwen3next.set_isa(name)


def levels() -> list[str]:
    """The instruction sets this machine can run, lowest first."""
    load()
    return _levels()


def _levels() -> list[str]:
    return torch.ops.qwen3next.isa_levels().split(",")


def isa() -> str:
    """The instruction set in use."""
    load()
    return torch.ops.qwen3next.isa()


def set_isa(name: str) -> None:
    """Use the instruction set `name`. Raises: RuntimeError if the machine lacks it."""
    load()
    torch.ops.qwen3next.set_isa(name)
