"""The layers of a host that ours are built of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.kernels.silu_and_mul import silu_and_mul

Build = Callable[..., Any]  # Any: hosts' layers are not typed


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLayers:
    """How an engine builds its layers, all but their sizes, bias and prefix filled in.

    Both engines' classes take the same arguments. A projection returns its output and a bias.
    """

    column_parallel: Build  # each rank has a part of the output
    merged_column_parallel: Build  # of each of several outputs
    qkv_parallel: Build  # whole heads
    row_parallel: Build  # each rank has a part of the input; the outputs are summed
    replicated: Build  # each rank has all of it
    silu_and_mul: Build


def activation(of_host: Build) -> Build:
    """How an engine builds SwiGLU's activation: by our kernel if bits must not depend on it.

    Hosts round it once or twice, as they compile or not.
    """
    return (lambda: silu_and_mul) if env.batch_invariant() else of_host
