"""On GPUs: an engine's quantisation leaves the modules that the files have unquantised.

config.json names what is left out in ways that differ from tool to tool, and some do not name the
MTP layer's input, or a projection by the name that an engine stacks it under.
"""

from collections.abc import Callable, Collection
from copy import copy
from typing import Any, TypeVar

from qwen3next_plugin.model.formats import without_wrapper

AS_STORED = "qwen3next_as_stored"  # an attribute of a quantisation that was told
Config = TypeVar("Config")


def as_stored(
    config: Config, plain: Collection[str], linear: type[Any], unquantised: Callable[[], Any]
) -> Config:
    """An engine's quantisation, by which these modules are not quantised.

    Args:
        linear: the class of an engine's projections.
        unquantised: makes their method. Other layers choose theirs if there is none.
    """
    host = type(config)

    def get_quant_method(self: Any, layer: Any, prefix: str) -> Any:
        if without_wrapper(prefix) in plain:
            return unquantised() if isinstance(layer, linear) else None
        return host.get_quant_method(self, layer, prefix)  # type: ignore[attr-defined]

    told = copy(config)
    members = {"get_quant_method": get_quant_method, AS_STORED: True}
    told.__class__ = type(host.__name__, (host,), members)
    return told
