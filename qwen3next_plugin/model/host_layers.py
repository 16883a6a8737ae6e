"""The host's layers from which ours are built."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.kernels.silu_and_mul import silu_and_mul

Build = Callable[..., Any]  # Any: hosts' layers are not typed


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayers:
    """Constructors of an engine's layers; callers add sizes, bias and prefix.

    Both engines' classes take the same arguments. A projection returns its output and a bias.
    """

    column_parallel: Build  # each rank has a part of the output
    merged_column_parallel: Build  # of each of several outputs
    qkv_parallel: Build  # whole heads
    row_parallel: Build  # each rank has a part of the input; the outputs are summed
    replicated: Build  # each rank has all of it
    silu_and_mul: Build


def activation(of_host: Build) -> Build:
    """Constructor of SwiGLU's activation: our kernel's if bits must not depend on the host.

    A host rounds once or twice, depending on whether it compiles.
    """
    return (lambda: silu_and_mul) if env.batch_invariant() else of_host
