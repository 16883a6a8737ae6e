"""The error about a config, and checks of single values that raise it."""

from typing import TypeGuard

LARGEST_COUNT = 2**31 - 1
LARGEST_NUMBER = 1e15  # arithmetic on larger ones would overflow
SHOWN = 200  # characters of a value in an error


class ConfigError(ValueError):
    """A config that cannot be served; the text names the field, its value and the fix."""


def shown(value: object) -> str:
    """A value as an error shows it; a file may have one of any length."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def complaint(name: str, found: object, fix: str) -> ConfigError:
    """The error about one field: its value, and what to write instead."""
    return ConfigError(f"{name} = {shown(found)}: {fix}")


def missing(name: str) -> ConfigError:
    """The error about a field that has no default."""
    return ConfigError(f"{name} is missing from the config; copy it from the model's release")


def check_count(name: str, value: object, least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Raise ConfigError unless `value` is a whole number from `least` to `most`."""
    if type(value) is not int or value < least:
        raise complaint(name, value, f"must be a whole number of at least {least}")
    if value > most:
        raise complaint(name, value, f"must be at most {most}; copy it from the model's release")


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number, no truth value, and of a size that can be computed with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST_NUMBER
