"""How the plugin holds on to SGLang's functions: each hook is checked before any is applied.

SGLang's hook registry logs a hook that fails and goes on without it, which would serve with half a
plugin. So every target and its parameters are compared with what the hook was written for.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from packaging.version import Version


class SeamError(RuntimeError):
    """A function of the host that is not what a hook was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hook:
    """A function of SGLang's, the parameters it had, and ours around it.

    `around` is called with the host's function and its arguments.
    """

    target: str
    parameters: tuple[str, ...]
    around: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute:
    """An attribute of a class or module of SGLang's that ours takes the place of."""

    target: str
    value: Any


def check(seams: Iterable[Hook | Attribute], version: Version) -> None:
    """Raise SeamError unless each target is there and takes what it took."""
    for seam in seams:
        found = _resolve(seam.target, version)
        if isinstance(seam, Attribute):
            continue
        parameters = tuple(inspect.signature(found).parameters)
        if parameters != seam.parameters:
            raise SeamError(
                f"SGLang {version} has {seam.target}({', '.join(parameters)}); this plugin was "
                f"written for ({', '.join(seam.parameters)}): install a release of "
                f"qwen3next-plugin that is tested with SGLang {version}"
            )


def apply(seams: Iterable[Hook | Attribute]) -> None:
    """Register the hooks with SGLang, which puts them in place, and set the attributes."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for seam in seams:
        if isinstance(seam, Hook):
            HookRegistry.register(seam.target, seam.around, HookType.AROUND)
        else:
            owner, _, name = seam.target.rpartition(".")
            setattr(pkgutil.resolve_name(owner), name, seam.value)
    HookRegistry.apply_hooks()


def _resolve(target: str, version: Version) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise SeamError(
            f"SGLang {version} has no {target} ({error}): install a release of qwen3next-plugin "
            f"that is tested with SGLang {version}"
        ) from error
