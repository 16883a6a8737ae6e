"""RoPE in a config: its spellings, YaRN, and how many positions it covers."""

import json
import math
from collections.abc import Mapping
from typing import Any

from qwen3next_plugin.config.errors import ConfigError, check_count, complaint, is_number, missing

SPELLINGS = ("rope_parameters", "rope_scaling")  # the new one and the old one
OF_ROPE = ("rope_theta", "partial_rotary_factor")  # also at the config's top level
OF_IMAGES = ("mrope_section", "mrope_interleaved")
ORIGINAL = "original_max_position_embeddings"
NUMBERS_OF_YARN = (  # that transformers has defaults for
    *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
)
OF_YARN = ("factor", ORIGINAL, *NUMBERS_OF_YARN, "truncate")
MOST_POSITIONS = 2**24  # engines keep a table with a row for each


def read(raw: Mapping[str, Any], override_flag: str) -> dict[str, Any]:
    """RoPE in full, from either spelling and the top-level fields.

    Raises:
        ConfigError: the fix names `override_flag`, the engine's flag that overrides values.
    """
    source = next((name for name in SPELLINGS if raw.get(name)), SPELLINGS[0])
    if not isinstance(given := raw.get(source) or {}, Mapping):
        raise complaint(source, given, "must be an object, or absent")
    if (old := raw.get("rope_scaling")) and old != given:
        fix = "rope_parameters says something else; write all fields in rope_parameters"
        raise complaint("rope_scaling", old, fix)
    rope = with_type(given)
    for name in OF_ROPE:
        inner, outer = rope.get(name), raw.get(name)
        if inner is None and outer is None:
            raise _lost(name, rope, override_flag) if given else missing(name)
        if None not in (inner, outer) and inner != outer:
            fix = f"{source} says {inner!r}, and that is what counts; override {source} in full"
            raise complaint(name, outer, fix)
        rope[name] = outer if inner is None else inner
    if rope["rope_type"] == "yarn":
        rope.setdefault(ORIGINAL, raw.get("max_position_embeddings"))
    return rope


def with_type(given: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `rope_type`, for which older configs have `type`."""
    rope = dict(given)
    legacy = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or legacy or "default"
    return rope


def _lost(name: str, rope: Mapping[str, Any], override_flag: str) -> ConfigError:
    """The error about a dict that lacks a field; it shows what to write."""
    released = {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    full = released | {key: value for key, value in rope.items() if value is not None}
    fix = f"{override_flag} '{json.dumps({'rope_parameters': full})}'".lstrip()
    return ConfigError(
        f"rope_parameters has lost {name}: without it, positions would turn at other speeds than "
        f"the model was trained with. Write it in full, with the checkpoint's own values (shown: "
        f"the released models'): {fix}"
    )


# checks -------------------------------------------------------------------------------------------


def check(rope: Mapping[str, Any], head_dim: int) -> None:
    """Raise ConfigError unless the rotation can be computed."""
    partial, theta = rope.get("partial_rotary_factor"), rope.get("rope_theta")
    if not is_number(partial) or not 0 < partial <= 1:
        raise complaint("partial_rotary_factor", partial, "must be in (0, 1] (released: 0.25)")
    if not is_number(theta) or theta <= 0:
        raise complaint("rope_theta", theta, "must be positive (released: 10000000)")
    if (dims := rotary_dim(rope, head_dim)) % 2 or not dims:
        fix = f"head_dim {head_dim} x partial_rotary_factor {partial} must be even, at least 2"
        raise complaint("rotary_dim", dims, fix)
    if (section := rope.get("mrope_section")) is not None:
        _check_sections(section, rope.get("mrope_interleaved"), dims // 2)
    check_type(rope)


def check_type(rope: Mapping[str, Any]) -> None:
    """Raise ConfigError unless RoPE is plain, or YaRN with valid values."""
    if rope.get("rope_type") not in ("default", "yarn"):
        raise complaint("rope_type", rope.get("rope_type"), "use 'default' or 'yarn'")
    if rope["rope_type"] == "default":
        if found := [name for name in OF_YARN if rope.get(name) is not None]:
            fix = "rope_type is default, which has no such field; make it yarn"
            raise complaint(f"rope_parameters.{found[0]}", rope[found[0]], fix)
        return
    if unknown := rope.keys() - {"rope_type", *OF_ROPE, *OF_IMAGES, *OF_YARN}:
        name = min(unknown)
        fix = f"it would be ignored; YaRN has {', '.join(OF_YARN)}"
        raise complaint(f"rope_parameters.{name}", rope[name], fix)
    if not is_number(factor := rope.get("factor")) or factor < 1:
        raise complaint("rope_parameters.factor", factor, "YaRN needs one of at least 1")
    check_count(f"rope_parameters.{ORIGINAL}", rope.get(ORIGINAL))
    if factor * rope[ORIGINAL] > MOST_POSITIONS:
        fix = f"times {ORIGINAL} = {rope[ORIGINAL]} it must be at most {MOST_POSITIONS}"
        raise complaint("rope_parameters.factor", factor, fix)
    for name in NUMBERS_OF_YARN:
        if (value := rope.get(name)) is not None and (not is_number(value) or value <= 0):
            raise complaint(f"rope_parameters.{name}", value, "must be positive, or absent")
    if not isinstance(truncate := rope.get("truncate", True), bool):
        raise complaint("rope_parameters.truncate", truncate, "must be true or false, or absent")


def _check_sections(section: object, interleaved: object, frequencies: int) -> None:
    sizes = section if isinstance(section, list | tuple) and len(section) == 3 else ()
    if not all(type(n) is int and n >= 0 for n in sizes) or sum(sizes) != frequencies:
        fix = f"must be three sizes that add up to rotary_dim / 2 = {frequencies}"
        raise complaint("mrope_section", section, fix)
    if interleaved is not True:
        raise complaint("mrope_interleaved", interleaved, "must be true")


def check_images(rope: Mapping[str, Any], text_only_flag: str) -> None:
    """Refuse YaRN for a model that reads images, if the sections of their positions are lost."""
    if rope["rope_type"] == "yarn" and not rope.get("mrope_section"):
        raise ConfigError(
            "rope_parameters has lost mrope_section: images would stand at the wrong positions; "
            "write mrope_section and mrope_interleaved as the released config.json has them, or "
            f"add {text_only_flag} to serve text"
        )


# what it covers ----------------------------------------------------------------------------------


def rotary_dim(rope: Mapping[str, Any], head_dim: int) -> int:
    """Dims of a head that are turned."""
    return int(head_dim * rope["partial_rotary_factor"])


def length(rope: Mapping[str, Any], max_position_embeddings: int) -> int:
    """Positions that RoPE covers: YaRN's are the original ones times its factor."""
    if rope["rope_type"] == "yarn":
        return int(rope["factor"] * rope[ORIGINAL])
    return max_position_embeddings


def check_length(
    rope: Mapping[str, Any], max_position_embeddings: int, asked: int, flag: str, extend: str
) -> None:
    """Refuse a context of `asked` tokens, by `flag`, that RoPE does not cover.

    `extend`: the flag that turns YaRN on, with %s where its JSON goes.
    """
    reach = length(rope, max_position_embeddings)
    if asked <= reach:
        return
    if rope["rope_type"] == "yarn":
        factor, original = rope["factor"], rope[ORIGINAL]
        covered = f"the {reach} positions that YaRN covers ({original} x factor {factor})"
        fix = f"a factor of at least {_enough(asked, original)}"
    else:
        covered = f"the model's {reach} positions"
        yarn = {"rope_type": "yarn", "factor": _enough(asked, reach), ORIGINAL: reach}
        fix = f"YaRN: {extend % json.dumps(yarn)}"
    raise ConfigError(f"{flag} {asked} is beyond {covered}: lower it, or serve with {fix}")


def _enough(asked: int, original: int) -> float:
    """A factor that covers `asked` positions, in halves."""
    return math.ceil(2 * asked / original) / 2
