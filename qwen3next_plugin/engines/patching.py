"""How the plugin holds on to SGLang's functions: each hook is checked before any is applied.

SGLang's hook registry logs a hook that fails and goes on without it, which would serve with half a
plugin. So every target and its parameters are compared with what the hook was written for.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterable, Sequence
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
            _check_kind(seam, found, version)
            continue
        parameters = tuple(inspect.signature(found).parameters)
        if parameters != seam.parameters:
            raise SeamError(
                f"SGLang {version} has {seam.target}({', '.join(parameters)}); this plugin was "
                f"written for ({', '.join(seam.parameters)}): {_mend(version)}"
            )


def _check_kind(seam: Attribute, found: Any, version: Version) -> None:
    """A property takes the place of a property, a tuple of a tuple; of what is None, anything."""
    if found is not None and type(found) is not type(seam.value):
        raise SeamError(
            f"SGLang {version} has {seam.target} as a {type(found).__name__}; this plugin was "
            f"written for a {type(seam.value).__name__}: {_mend(version)}"
        )


def put(
    seams: Sequence[Hook | Attribute], version: Version, apply: Callable[[Sequence[Hook]], None]
) -> None:
    """Check all, register the hooks with SGLang, which puts them in place, set the attributes.

    Raises:
        SeamError: a target that is not what it was, or that SGLang did not put our function at.
    """
    check(seams, version)
    for seam in seams:
        if isinstance(seam, Attribute):
            owner, _, name = seam.target.rpartition(".")
            setattr(pkgutil.resolve_name(owner), name, seam.value)
    apply([seam for seam in seams if isinstance(seam, Hook)])
    for seam in seams:  # SGLang only logs a hook that it cannot put in place
        if isinstance(seam, Hook) and not hasattr(_resolve(seam.target, version), "__wrapped__"):
            raise SeamError(f"SGLang {version} takes no hook at {seam.target}: {_mend(version)}")


def _mend(version: Version) -> str:
    return f"install a release of qwen3next-plugin that is tested with SGLang {version}"


def _resolve(target: str, version: Version) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise SeamError(f"SGLang {version} has no {target} ({error}): {_mend(version)}") from error
