"""How the plugin changes SGLang: a patch stands beside its function; docs/patches.md lists all."""

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial, reduce
from importlib import import_module
from pathlib import Path
from typing import Any

from qwen3next_plugin.engines.extras import modules_with_patches
from qwen3next_plugin.engines.patch_table import Table
from qwen3next_plugin.engines.patching import Function, Host
from qwen3next_plugin.engines.sglang.names import PACKAGE
from qwen3next_plugin.versions import check_host


class When(Enum):
    """A group of patches, all applied when the plugin is registered, by where that is."""

    REGISTERED = "on any device"
    WITH_OURS = "on a device with our kernels"
    ON_CPU = "on a CPU"
    ON_GPU = "on a GPU"
    NO_KERNELS = "on a device without our kernels"


# The modules with patches that are put in place; those with overrides are imported where they act.
MODULES = (
    *("flags", "hooks", "pacing", "model.config"),
    *("cpu.attention_backend", "cpu.host_bar", "cpu.memory"),
    *("speculation.logits", "speculation.penalties", "speculation.reserve"),
    *("speculation.sessions", "speculation.stops", "speculation.verify"),
)

VERSIONS = "==0.5.23"  # that need these patches
TABLE = Table(VERSIONS, Path(__file__).with_name("signatures.json"))
patch = TABLE.patch


def apply(*groups: When) -> None:
    """Check and apply groups, each once in a process."""
    for module in (*(f"{PACKAGE}.{name}" for name in MODULES), *modules_with_patches("sglang")):
        import_module(module)
    TABLE.apply(groups, Host("SGLang", check_host("sglang")), register_hooks)


def register_hooks(patches: Sequence[Function]) -> None:
    """Put functions in place through SGLang's own registry, which wants one for each target."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    by_target: dict[str, list[Callable[..., Any]]] = {}
    for each in patches:
        by_target.setdefault(each.target, []).append(each.function)
    for target, functions in by_target.items():
        HookRegistry.register(target, reduce(_around, functions), HookType.AROUND)
    HookRegistry.apply_hooks()


def _around(inner: Callable[..., Any], outer: Callable[..., Any]) -> Callable[..., Any]:
    """A patch that calls `outer`, to which `inner` is the host's function."""
    return lambda host, *args, **kwargs: outer(partial(inner, host), *args, **kwargs)
