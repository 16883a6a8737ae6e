"""RoPE of a host's config: overrides, and the longest context."""

import json
from collections.abc import Mapping
from typing import Any

from qwen3next_plugin.config.errors import ConfigError, check_count
from qwen3next_plugin.config.rope import (
    OF_IMAGES,
    OF_ROPE,
    ORIGINAL,
    SPELLINGS,
    check_length,
    check_type,
    length,
    read,
    with_type,
)

EXAMPLE = f'{{"rope_type": "yarn", "factor": 4.0, "{ORIGINAL}": 262144}}'


def parse(text: str, flag: str) -> dict[str, Any]:
    """A flag's RoPE fields; raises ConfigError."""
    try:
        given = json.loads(text)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise ConfigError(f"{flag} {text}: this is no JSON object; write it as '{EXAMPLE}'")
    return given


def split(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Split overrides of a config into those of RoPE, at either level, and the others.

    Raises:
        ConfigError: RoPE is given at both levels.
    """
    rest = dict(overrides)
    levels = [rest]
    if isinstance(nested := rest.get("text_config"), Mapping):
        rest["text_config"] = dict(nested)
        levels.append(rest["text_config"])
    given = [
        (name, level.pop(name))
        for level in levels
        for name in SPELLINGS
        if isinstance(level.get(name), Mapping)
    ]
    if len(given) > 1:
        raise ConfigError(f"{given[0][0]} and {given[1][0]} are both overridden; override one")
    return rest, dict(given[0][1]) if given else None


def merge(raw: Mapping[str, Any], given: Mapping[str, Any], *, resized: bool) -> dict[str, Any]:
    """A text config's RoPE, overridden by the fields in `given`.

    `resized`: max_position_embeddings is overridden, too. YaRN's original length must then be
    given, because nothing else says what it was.
    """
    rope = with_type(next((raw[name] for name in SPELLINGS if raw.get(name)), {}))
    same = {"rope_type": rope["rope_type"]}
    new = with_type(given if {"rope_type", "type"} & given.keys() else same | dict(given))
    if new["rope_type"] != rope["rope_type"]:
        rope = {name: rope[name] for name in (*OF_ROPE, *OF_IMAGES) if name in rope}
    for name in OF_ROPE:
        rope.setdefault(name, raw.get(name))
    if new["rope_type"] == "yarn" and {**rope, **new}.get(ORIGINAL) is None:
        if resized:
            raise ConfigError(
                f"rope_scaling has lost {ORIGINAL}: max_position_embeddings is overridden, too, so "
                f"that nothing says what the model was trained with; add it (released models: "
                f'"{ORIGINAL}": 262144)'
            )
        new[ORIGINAL] = raw.get("max_position_embeddings")
    return rope | new


def override(text_config: Any, given: Mapping[str, Any], everything: Mapping[str, Any]) -> None:
    """Merge overrides of RoPE, `given`, into a host's text config, in place.

    `everything`: all overrides of this config, with those of the text model nested.
    """
    levels = (everything, everything.get("text_config") or {})
    resized = any("max_position_embeddings" in level for level in levels)
    put(text_config, merge(_fields(text_config), given, resized=resized))


def put(text_config: Any, rope: Mapping[str, Any]) -> None:
    """Make this the RoPE of a host's text config, at its top level, too."""
    for name in OF_ROPE:
        if name in rope and getattr(text_config, name, None) is not None:
            setattr(text_config, name, rope[name])
    text_config.rope_parameters = dict(rope)


def extend(
    text_config: Any, asked: int | None, *, flag: str, extend: str, override_flag: str
) -> None:
    """Set a host's longest context to what RoPE covers; refuse a longer one, `asked`.

    Hosts use `max_position_embeddings`, which YaRN does not change.
    """
    raw = _fields(text_config)
    rope = read(raw, override_flag)
    check_type(rope)
    check_count("max_position_embeddings", positions := raw["max_position_embeddings"])
    if asked is not None:
        check_length(rope, positions, asked, flag, extend)
    if rope["rope_type"] == "yarn":
        text_config.rope_parameters = rope
        text_config.max_position_embeddings = length(rope, positions)


def _fields(text_config: Any) -> dict[str, Any]:
    names = (*SPELLINGS, *OF_ROPE, "max_position_embeddings")
    return {name: getattr(text_config, name, None) for name in names}
