"""Kinds of models whose configs have more than the family's fields: each is of an extra."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen3next_plugin.config.errors import complaint
from qwen3next_plugin.config.sizes import Layout

EXTRAS = Path(__file__).parents[1] / "extras"
NAMES = ("qwen4_exp",)  # an extra serves model types that begin so, and is of this name


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigKind:
    """How the configs of a kind of model are read."""

    model_types: Mapping[str, tuple[Layout, bool | None]]  # as those of `reading.py`
    architectures: str  # their names begin so
    config: type[Any]  # a subclass of Qwen3NextConfig, with its fields
    checks: Mapping[str, Callable[[str, object], None]]  # of the types of its fields
    # Its fields, of a text model's config whose types are right; raises ConfigError.
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    full_attention: tuple[str, ...] = ()  # what layer_types may have in place of it


def modules(name: str) -> tuple[ModuleType, ...]:
    """The modules of that name in extras, each with a KIND."""
    extras = sorted(path.parent.name for path in EXTRAS.glob(f"*/{name}.py"))
    return tuple(import_module(f"qwen3next_plugin.extras.{extra}.{name}") for extra in extras)


@cache
def config_kinds() -> tuple[ConfigKind, ...]:
    """Those of all extras."""
    return tuple(module.KIND for module in modules("config"))


def config_kind(model_type: object) -> ConfigKind | None:
    """The kind that a model type is of; None: it is of the family, or of no kind."""
    kinds = (kind for kind in config_kinds() if model_type in tuple(kind.model_types))
    return next(kinds, None)


def check_extra(model_type: object) -> None:
    """Refuse a model whose extra is not there. Raises: ConfigError."""
    for name in NAMES:
        if str(model_type).startswith(name) and config_kind(model_type) is None:
            fix = f"it needs the extra {name}, which is not in qwen3next_plugin/extras"
            raise complaint("model_type", model_type, fix)
