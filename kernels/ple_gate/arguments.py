"""The op's weights, and their checks."""

from typing import NamedTuple

from torch import Tensor

from qwen3next_plugin.kernels.checks import FLOAT, check


class PLENorms(NamedTuple):
    """Zero-centred norms of the streams, of the keys, and of what the convolution reads.

    Shapes: query, key, conv [hc · D], all fp32 or all of the activations' dtype
    """

    query: Tensor
    key: Tensor
    conv: Tensor


def check_norms(op: str, norms: PLENorms, streams_: Tensor) -> None:
    """Raise ValueError unless the norms fit the streams [T, hc, D]."""
    _, hc, D = streams_.shape
    dtypes: tuple = (streams_.dtype, *FLOAT)
    for name, weight in zip(norms._fields, norms, strict=True):
        check(op, f"norms.{name}", weight, (hc * D,), dtypes, streams_.device)
        dtypes = (weight.dtype,)
