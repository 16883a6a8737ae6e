"""The type and the bounds of every field of a config that is read.

They are checked first of all: an engine's own reader ends in errors that name no file, and would
build a list of as many layers as the file claims.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from qwen3next_plugin.config import rope
from qwen3next_plugin.config.errors import LARGEST_COUNT, check_count, complaint, is_number
from qwen3next_plugin.config.kinds import config_kind
from qwen3next_plugin.config.sizes import Sizes

Check = Callable[[str, object], None]  # of a field's name and value
MAY_BE_ZERO = (  # checks.py checks them where the model has such layers
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "intermediate_size"),
)
MOST = {
    "num_hidden_layers": 1000,
    "num_experts": 4096,
    "max_position_embeddings": rope.MOST_POSITIONS,
}


# kinds of fields ----------------------------------------------------------------------------------


def _count(name: str, value: object) -> None:
    check_count(name, value, int(name not in MAY_BE_ZERO), MOST.get(name, LARGEST_COUNT))


def _mtp_layers(name: str, value: object) -> None:
    check_count(name, value, least=0)
    if value not in (0, 1):
        raise complaint(
            *(name, value),
            "the plugin drafts with one MTP layer; use the released checkpoint, which has one, or "
            "set QWEN3NEXT_DISABLE=1 to serve this one with the engine's own model",
        )


def _number(name: str, value: object) -> None:
    if not is_number(value):
        raise complaint(name, value, "must be a number")


def _flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise complaint(name, value, "must be true or false")


def _text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise complaint(name, value, "must be a text, or absent")


def _list(name: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        raise complaint(name, value, "must be a list, or absent")


def _texts(name: str, value: object) -> None:
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise complaint(name, value, "must be a list of texts, or absent")


def _object(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise complaint(name, value, "must be an object, or absent")


# fields -------------------------------------------------------------------------------------------

BY_TYPE: Mapping[Any, Check] = {
    int: _count,
    float: _number,
    bool: _flag,
    str: _text,
    tuple[str, ...]: _list,
    tuple[int, ...]: _list,
    Mapping[str, Any]: _object,
}
OF_SIZES: Mapping[str, Check] = {
    **{f.name: BY_TYPE[f.type] for f in fields(Sizes) if f.type in BY_TYPE},
    "num_nextn_predict_layers": _mtp_layers,
}
OF_TEXT_MODEL: Mapping[str, Check] = {
    **{name: check for name, check in OF_SIZES.items() if name not in ("tp_size", "pp_size")},
    "mtp_num_hidden_layers": _mtp_layers,
    "full_attention_interval": _count,
    "rope_scaling": _object,
    **dict.fromkeys(rope.OF_ROPE, _number),
}
OF_ROPE: Mapping[str, Check] = {
    **dict.fromkeys(("rope_type", "type"), _text),
    **dict.fromkeys((*rope.OF_ROPE, "factor", *rope.NUMBERS_OF_YARN), _number),
    rope.ORIGINAL: _count,
    "mrope_section": _list,
}
OF_QUANTISATION: Mapping[str, Check] = {
    **dict.fromkeys(("quant_method", "checkpoint_format"), _text),
    **dict.fromkeys(("producer", "quantization"), _object),
}
QUANTISATIONS = ("quantization_config", "compression_config")
OF_FILE: Mapping[str, Check] = {  # that only the engines read, or only for a kind of checkpoint
    "architectures": _texts,
    **dict.fromkeys(("model_type", "dtype", "torch_dtype"), _text),
    **dict.fromkeys(("text_config", "vision_config", *QUANTISATIONS), _object),
}


def check_file(raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field of config.json that is not what it must be, at either level."""
    _check(raw, OF_FILE)
    for level in (raw, raw.get("text_config") or {}):
        _check(level, OF_FILE)
        for name in QUANTISATIONS:
            _check(level.get(name) or {}, OF_QUANTISATION, f"{name}.")
        check_text_model(level)


def check_text_model(level: Mapping[str, Any]) -> None:
    """Raise ConfigError for a field of a text model's config that is not what it must be."""
    _check(level, OF_TEXT_MODEL)
    if kind := config_kind(level.get("model_type")):
        _check(level, kind.checks)
    for spelling in rope.SPELLINGS:
        _check(level.get(spelling) or {}, OF_ROPE, f"{spelling}.")


def _check(level: Mapping[str, Any], checks: Mapping[str, Check], within: str = "") -> None:
    """Null is as absent."""
    for name, check in checks.items():
        if (value := level.get(name)) is not None:
            check(f"{within}{name}", value)
