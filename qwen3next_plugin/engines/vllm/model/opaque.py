"""Ops that are opaque to vLLM's compiler: a layer's part that depends on the step's metadata."""

from collections.abc import Callable
from typing import Any

from vllm.utils.torch_utils import direct_register_custom_op

from qwen3next_plugin.engines.patching import Item
from qwen3next_plugin.engines.vllm.names import OPAQUE_OP
from qwen3next_plugin.engines.vllm.patches import TABLE, When

TABLE.add(
    Item(
        target="vllm.config.compilation.CompilationConfig._attention_ops",
        value=OPAQUE_OP,
        group=When.ON_GPU,
        reason="a piecewise CUDA graph must be cut where a step chooses its pages; vLLM's "
        "setting replaces the list and cannot add to it",
        remove_when="an op can declare that graphs are cut at it",
    )
)


def register(name: str, function: Callable[..., None], out: str) -> None:
    """Make `function`, which writes into its argument `out`, the op `vllm::name`."""
    direct_register_custom_op(
        op_name=name, op_func=function, mutates_args=[out], fake_impl=_write_nothing
    )


def _write_nothing(*_: Any) -> None:
    """The op for tensors without data."""
