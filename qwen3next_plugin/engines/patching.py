"""Patches of a host: every one is checked against the installed host before any is applied.

If the host has changed, the launch stops here, with an error that names what does not fit. SGLang's
hook registry would only log it, and serve with part of the plugin.
"""

import inspect
import pkgutil
from collections.abc import Callable, Iterable, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import wraps
from typing import Any, TypeVar

from packaging.version import Version

T = TypeVar("T")


class PatchError(RuntimeError):
    """A part of the host differs from what a patch was written for."""


@dataclass(frozen=True, slots=True)
class Host:
    """The installed host."""

    name: str
    version: Version

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A change to the host."""

    target: str  # dotted name, from the package on
    reason: str
    remove_when: str
    versions: str = ""  # host versions that need it; filled in by the table
    upstream: str = ""  # a link: the host's issue, its fix, or what brought the defect
    module: str = ""  # our module that declares it
    group: Enum | None = None  # when it is applied; None: by our own code


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch(Entry):
    """A function; ours is called instead, with the host's function and then its arguments."""

    parameters: tuple[str, ...] | None
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement(Entry):
    """A function; ours is called instead, with the same arguments and any that follow them."""

    parameters: tuple[str, ...] | None
    function: Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attribute(Entry):
    """An attribute of a class or module, set to `value`."""

    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Item(Entry):
    """An item added to a list, or under `key` to a dict."""

    value: Any
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Override(Entry):
    """An internal of the host that the plugin changes on its own objects.

    A private method that a subclass overrides, an attribute of an instance, or a class in a module
    while one of its objects is built. Nothing is applied here; the contract test compares it with
    the host's source.
    """

    parameters: tuple[str, ...] | None = None  # of a method


def override(*targets: str, reason: str, remove_when: str, upstream: str = "") -> Callable[[T], T]:
    """Declare an Override of each target by the decorated code; the contract test reads it."""
    return lambda code: code


Function = Patch | Replacement
FUNCTIONS = (Patch, Replacement)
OF_RAY = "_ray_trace_ctx"  # a parameter that Ray adds to methods


METHODS = (classmethod, staticmethod)


def wrap(functions: Sequence[Function]) -> None:
    """Put each function in place by assignment, for a host without a registry."""
    for entry in functions:
        owner, name = _owner(entry.target)
        kind = type(vars(owner).get(name))
        function = entry.function
        if isinstance(entry, Patch):
            original = getattr(owner, name)
            function = _around(entry, getattr(original, "__func__", original))
        setattr(owner, name, kind(function) if kind in METHODS else function)


def _around(patch: Patch, original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return patch.function(original, *args, **kwargs)

    return patched


def check(entries: Iterable[Entry], host: Host) -> None:
    """Raise PatchError unless every target exists and is what its patch was written for."""
    for entry in entries:
        if isinstance(entry, Override):
            continue
        found = _resolve(entry.target, host)
        if isinstance(entry, FUNCTIONS):
            _check_parameters(entry, found, host)
        elif isinstance(entry, Attribute):
            _check_type(entry, found, host)
        elif isinstance(entry, Item):
            _check_container(entry, found, host)


def apply(
    entries: Sequence[Entry], host: Host, put: Callable[[Sequence[Function]], None] = wrap
) -> None:
    """Check all entries, then set attributes and items, and put functions in place by `put`.

    Raises:
        PatchError: a target is not as expected, or `put` did not change it.
    """
    check(entries, host)
    for entry in entries:
        if isinstance(entry, Attribute):
            setattr(*_owner(entry.target), entry.value)
        elif isinstance(entry, Item):
            _add(entry, pkgutil.resolve_name(entry.target))
    functions = [entry for entry in entries if isinstance(entry, FUNCTIONS)]
    before = [_resolve(entry.target, host) for entry in functions]
    put(functions)
    for entry, original in zip(functions, before, strict=True):
        if _resolve(entry.target, host) is original:
            raise PatchError(f"{host} accepts no patch of {entry.target}: {_fix(host)}")


def _check_parameters(entry: Function, found: Any, host: Host) -> None:
    if entry.parameters is None:
        raise PatchError(f"the signature of {entry.target} is not written down: {_fix(host)}")
    signature = inspect.signature(getattr(found, "__func__", found))
    parameters = tuple(name for name in signature.parameters if name != OF_RAY)
    if isinstance(entry, Replacement):
        parameters = parameters[: len(entry.parameters)]
    if parameters != entry.parameters:
        raise PatchError(
            f"{host} has {entry.target}({', '.join(parameters)}); this plugin was written for "
            f"({', '.join(entry.parameters)}): {_fix(host)}"
        )


def _check_type(entry: Attribute, found: Any, host: Host) -> None:
    """Only a property may replace a property, and a tuple a tuple; anything may replace None."""
    if found is not None and type(found) is not type(entry.value):
        raise _other_type(entry, found, type(entry.value).__name__, host)


def _check_container(entry: Item, found: Any, host: Host) -> None:
    if not isinstance(found, MutableSequence if entry.key is None else MutableMapping):
        raise _other_type(entry, found, "list" if entry.key is None else "dict", host)


def _other_type(entry: Entry, found: Any, expected: str, host: Host) -> PatchError:
    return PatchError(
        f"{host} has {entry.target} as a {type(found).__name__}; this plugin was written for a "
        f"{expected}: {_fix(host)}"
    )


def _add(entry: Item, container: Any) -> None:
    if entry.key is not None:
        container[entry.key] = entry.value
    elif entry.value not in container:
        container.append(entry.value)


def _fix(host: Host) -> str:
    return f"install a release of qwen3next-plugin that is tested with {host}"


def _owner(target: str) -> tuple[Any, str]:
    owner, _, name = target.rpartition(".")
    return pkgutil.resolve_name(owner), name


def _resolve(target: str, host: Host) -> Any:
    try:
        return pkgutil.resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise PatchError(f"{host} has no {target} ({error}): {_fix(host)}") from error
