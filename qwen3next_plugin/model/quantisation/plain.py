"""On GPUs: make an engine's quantisation skip the modules that the files have unquantised.

Each tool names skipped modules in config.json in its own way; some do not name the MTP layer's
input, or use names that the engine does not know for stacked projections.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from copy import copy
from typing import Any, TypeVar

from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.layouts import Shapes
from qwen3next_plugin.model.quantisation.modules import (
    NO_PART,
    PLAIN_DTYPES,
    Stream,
    matrices,
    without_wrapper,
)

LEAVES_PLAIN = "qwen3next_leaves_plain"  # an attribute of what `leave_plain` returns
Config = TypeVar("Config")


def plain_modules(tensors: Stream, shapes: Shapes, holder: Callable[[str], str]) -> frozenset[str]:
    """Our modules that are unquantised in the files.

    Args: as of `modules.stored_formats`.

    Raises: CheckpointError for a module of which the files have only a part quantised.
    """
    shapes = matrices(shapes)
    plain: dict[str, bool] = {}
    for name, tensor in tensors:
        module, _, last = name.rpartition(".")
        if f"{module}.weight" in shapes and last not in NO_PART:
            whole = last == "weight" and tensor.dtype in PLAIN_DTYPES
            plain[module] = plain.get(module, True) and whole
    found: dict[str, dict[bool, str]] = defaultdict(dict)
    for module, whole in plain.items():
        found[holder(module)][whole] = module
    for ours, parts in found.items():
        if len(parts) > 1:
            raise CheckpointError(
                f"{ours}: {parts[False]} is quantised, and {parts[True]} is not; a GPU's kernels "
                f"take both in one format: use a checkpoint with both quantised, or neither"
            )
    return frozenset(ours for ours, parts in found.items() if True in parts)


def leave_plain(
    config: Config, plain: Collection[str], linear: type[Any], unquantised: Callable[[], Any]
) -> Config:
    """An engine's quantisation that skips these modules.

    Args:
        linear: the class of an engine's projections.
        unquantised: makes their method. Other layers choose theirs if there is none.
    """
    host = type(config)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        if without_wrapper(prefix) in plain:
            return unquantised() if isinstance(layer, linear) else None
        return host.get_quant_method(self, layer, prefix)  # type: ignore[attr-defined]

    changed = copy(config)
    members = {"get_quant_method": get_quant_method, LEAVES_PLAIN: True}
    changed.__class__ = type(host.__name__, (host,), members)
    return changed
