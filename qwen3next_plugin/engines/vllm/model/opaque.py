"""Ops that are opaque to vLLM's compiler: a layer's part that depends on the step's metadata."""

from collections.abc import Callable
from typing import Any

from vllm.utils.torch_utils import direct_register_custom_op


def register(name: str, function: Callable[..., None], out: str) -> None:
    """Make `function`, which writes into its argument `out`, the op `vllm::name`."""
    direct_register_custom_op(
        op_name=name, op_func=function, mutates_args=[out], fake_impl=_write_nothing
    )


def _write_nothing(*_: Any) -> None:
    """The op for tensors without data."""
