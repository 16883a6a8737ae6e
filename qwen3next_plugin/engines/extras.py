"""Extras: features that the package can do without, in folders that may be deleted.

The core names none of them. An extra has a folder for each engine that it adds to, below
`qwen3next_plugin/extras/<extra>/`, whose `ADDS` says what. What it adds for any engine is in files
of that folder: commands (`commands.py`), environment variables (`variables.py`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3next_plugin.config import Qwen3NextConfig

if TYPE_CHECKING:
    import torch

    from qwen3next_plugin.model.state import PageLayout

PACKAGE = "qwen3next_plugin.extras"
FOLDER = Path(__file__).parents[1] / "extras"
MISSING = "the extra of qwen3next_plugin that serves it is not installed"
Log = Callable[[str], None]  # called with a line
# Reloads a worker's weights from a folder or from given tensors; returns why they are refused.
Reload = Callable[[Any, str | None, Iterable[tuple[str, Any]] | None], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Models that an extra serves on a CPU: by the engine's names of them, `module:Class` of ours.

    The functions are called for every model of ours.
    """

    trunks: Mapping[str, str]
    drafters: Mapping[str, str] = field(default_factory=dict)
    # Refuses flags, given the config and the flags; fills in flags.
    check: Callable[[Qwen3NextConfig, Any], None] = lambda config, flags: None
    complete: Callable[[Any], None] = lambda flags: None
    # The config of the text model that is served, from one that the engine has read.
    text_config: Callable[[Any], Any] = lambda hf_config: hf_config
    # Elements that attention keeps of a token for each KV head, besides key and value.
    kv_elements: Callable[[Qwen3NextConfig], int] = lambda config: 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Additions:
    """What an extra adds to an engine."""

    patches: tuple[str, ...] = ()  # modules with patches, in its folder
    check: Callable[[Any], None] | None = None  # of complete flags, before workers start
    # called with a rank's config, its page and device, before the model is made
    before_load: "Callable[[Qwen3NextConfig, PageLayout, torch.device, Log], None] | None" = None
    complete: Callable[[Any], list[str]] | None = None  # on a CPU, fills in flags
    start: Callable[[Any], None] | None = None  # in each process of vLLM's engine
    reload: Reload | None = None  # while vLLM serves
    executors: Mapping[str, str] = field(default_factory=dict)  # vLLM's: a flag's value → class
    flags: tuple[str, ...] = ()  # that it serves, of OF_EXTRAS in the engine's served.py
    models: Models | None = None


@cache
def additions(engine: str) -> Mapping[str, Additions]:
    """What all extras add to an engine, by package name."""
    names = sorted(path.parts[-3] for path in FOLDER.glob(f"*/{engine}/__init__.py"))
    packages = [f"{PACKAGE}.{name}.{engine}" for name in names]
    return {package: import_module(package).ADDS for package in packages}


def modules_with_patches(engine: str) -> list[str]:
    """The modules with patches of all extras."""
    return [
        f"{package}.{module}"
        for package, adds in additions(engine).items()
        for module in adds.patches
    ]


def models(engine: str) -> list[Models]:
    """Those of all extras."""
    return [adds.models for adds in additions(engine).values() if adds.models is not None]


def load_class(path: str) -> type[Any]:
    """The class that is named as `module:Class`."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def check_flags(engine: str, flags: Any) -> None:
    """Let all extras check an engine's flags.

    Raises:
        ConfigError: names the flag and the fix.
    """
    for adds in additions(engine).values():
        if adds.check is not None:
            adds.check(flags)


def before_load(
    engine: str,
    config: "Qwen3NextConfig",
    page: "PageLayout",
    device: "torch.device",
    log: Log,
) -> None:
    """Let all extras check what a rank is about to serve, or prepare for it; raises as they do."""
    for adds in additions(engine).values():
        if adds.before_load is not None:
            adds.before_load(config, page, device, log)


def complete_flags(engine: str, flags: Any) -> list[str]:
    """Let all extras fill in missing flags, after the checks; returns them as typed."""
    every = [adds.complete for adds in additions(engine).values() if adds.complete is not None]
    return [word for complete in every for word in complete(flags)]


def start(engine: str, config: Any) -> None:
    """Let all extras prepare a process in which an engine schedules or computes."""
    for adds in additions(engine).values():
        if adds.start is not None:
            adds.start(config)


def reloader(engine: str) -> Reload | None:
    """The function that reloads weights while an engine serves."""
    return next((adds.reload for adds in additions(engine).values() if adds.reload), None)


def executors(engine: str) -> dict[str, str]:
    """Executor classes that extras add, by value of --distributed-executor-backend."""
    found = (adds.executors.items() for adds in additions(engine).values())
    return dict(chain.from_iterable(found))


def flags_served(engine: str) -> set[str]:
    """Flags that some extra serves."""
    return {flag for adds in additions(engine).values() for flag in adds.flags}
