"""The error about a config, and checks of single values that raise it."""

import math
from typing import TypeGuard


class ConfigError(ValueError):
    """A config that cannot be served; the text names the field, its value and the fix."""


def complaint(name: str, found: object, fix: str) -> ConfigError:
    """The error about one field: its value, and what to write instead."""
    return ConfigError(f"{name} = {found!r}: {fix}")


def missing(name: str) -> ConfigError:
    """The error about a field that has no default."""
    return ConfigError(f"{name} is missing from the config; copy it from the model's release")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise complaint(name, value, f"must be a whole number of at least {least}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, finite, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
