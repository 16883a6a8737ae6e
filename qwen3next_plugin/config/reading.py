"""Reads a config in every spelling: nested or flat, old or new names."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from qwen3next_plugin.config import rope
from qwen3next_plugin.config.errors import ConfigError, check_count, complaint, missing, shown
from qwen3next_plugin.config.fields import check_text_model
from qwen3next_plugin.config.kinds import ConfigKind, check_extra, config_kind, config_kinds
from qwen3next_plugin.config.sizes import LAYER_TYPES, Layout, Sizes

# Of each model_type: the layout of its checkpoints, and whether its layers have experts. Those that
# end in `_mtp` are vLLM's copies for the drafter, whose experts are known by their number only.
MODEL_TYPES: Mapping[str, tuple[Layout, bool | None]] = {
    "qwen3_next": ("grouped", True),
    "qwen3_next_mtp": ("grouped", True),
    "qwen3_5": ("flat", False),
    "qwen3_5_text": ("flat", False),
    "qwen3_5_moe": ("flat", True),
    "qwen3_5_moe_text": ("flat", True),
    "qwen3_5_mtp": ("flat", None),
}
NAMES = {f.name for f in fields(Sizes)}
OLD_SPELLINGS = ("full_attention_interval", "partial_rotary_factor", "rope_scaling", "rope_theta")
# The only value that is served of a field which other models of the kind have.
SERVED = {"attn_output_gate": True, "mtp_use_dedicated_embeddings": False}


def model_types() -> dict[str, tuple[Layout, bool | None]]:
    """MODEL_TYPES, and those of extras."""
    found = {**MODEL_TYPES}
    for kind in config_kinds():
        found |= kind.model_types
    return found


def read(given: Mapping[str, Any], override_flag: str) -> tuple[ConfigKind | None, dict[str, Any]]:
    """The fields of Sizes, but for the ranks, as far as the config gives them; raises ConfigError.

    And those of its kind, if it is of one. The fix in an error names `override_flag`, the engine's
    flag that overrides values.
    """
    raw = _text_config(given, override_flag)
    model_type = _model_type(raw)
    check_text_model(raw)
    values = {name: raw[name] for name in NAMES if raw.get(name) is not None}
    kind = config_kind(model_type)
    values["layout"] = model_types()[model_type][0]
    values["layer_types"] = _layer_types(raw, kind)
    values["mlp_only_layers"] = tuple(raw.get("mlp_only_layers") or ())
    values["rope_parameters"] = rope.read(raw, override_flag)
    if kind is not None:
        values |= kind.read(raw)
    for f in fields(Sizes):
        if f.default is MISSING and f.name not in values:
            raise missing(f.name)
    return kind, values


def check_kind(given: Mapping[str, Any], override_flag: str) -> None:
    """Refuse a config that mixes two kinds of models, or lacks part of its RoPE; see `read`."""
    raw = _text_config(given, override_flag)
    _model_type(raw)
    rope.read(raw, override_flag)


def _text_config(given: Mapping[str, Any], override_flag: str) -> dict[str, Any]:
    """The text model's fields, which a model with a vision tower has nested.

    Where both levels have one of the fields of Sizes they must agree, but for tied embeddings,
    which transformers writes at both levels and reads at either.
    """
    nested = given.get("text_config")
    if nested is None:
        raw = dict(given)
    elif not isinstance(nested, Mapping):
        raise complaint("text_config", nested, "must be an object, or absent")
    else:
        raw = {"model_type": given.get("model_type")} | dict(nested)
        _check_nesting(given, raw, override_flag)
        if given.get("tie_word_embeddings"):
            raw["tie_word_embeddings"] = given["tie_word_embeddings"]
    for level in (raw, given):
        if raw.get("num_nextn_predict_layers") is None:
            raw["num_nextn_predict_layers"] = level.get("mtp_num_hidden_layers")
    return raw


def _check_nesting(given: Mapping[str, Any], raw: Mapping[str, Any], override_flag: str) -> None:
    outer, inner = given.get("model_type"), raw["model_type"]
    # vLLM's copy for a drafter leaves the text model's as it is.
    is_drafter = outer in tuple(model_types()) and str(outer).endswith("_mtp")
    if not is_drafter and inner not in (outer, f"{outer}_text"):
        raise complaint("text_config.model_type", inner, f"model_type is {outer!r}; use one layout")
    both = (NAMES | set(OLD_SPELLINGS)) - {"tie_word_embeddings"}
    for name in sorted(both & given.keys()):
        if given[name] is not None and given[name] != raw.get(name):
            path = {"text_config": {name: given[name]}}
            fix = f"{override_flag} '{json.dumps(path)}'".lstrip()
            raise complaint(
                name,
                given[name],
                f"text_config says {shown(raw.get(name))}, and that is what counts; write {fix}",
            )


def _model_type(raw: Mapping[str, Any]) -> str:
    """The model_type, if this plugin serves it, and if it is the one that has these experts."""
    model_type, known = raw.get("model_type"), model_types()
    check_extra(model_type)
    if not isinstance(model_type, str) or model_type not in known:
        served = ", ".join(sorted(name for name in known if not name.endswith("_mtp")))
        raise complaint("model_type", model_type, f"this plugin serves {served} only")
    for name, value in SERVED.items():
        if raw.get(name, value) != value:
            raise complaint(name, raw[name], f"the model is computed with {value} only")
    has_experts, num_experts = known[model_type][1], raw.get("num_experts")
    if has_experts and num_experts is None:
        raise missing("num_experts")
    if has_experts is False and num_experts:
        fix = f"{model_type!r} has dense layers only; with experts it is 'qwen3_5_moe_text'"
        raise complaint("num_experts", num_experts, fix)
    return model_type


def _layer_types(raw: Mapping[str, Any], kind: ConfigKind | None) -> tuple[str, ...]:
    """From `layer_types` or `full_attention_interval`; if both are given, they must agree."""
    given, interval = raw.get("layer_types"), raw.get("full_attention_interval")
    if given is not None and kind is not None:
        given = tuple(LAYER_TYPES[1] if t in kind.full_attention else t for t in given)
    if given is None and interval is None:
        raise ConfigError("layer_types and full_attention_interval are missing: write either one")
    if interval is None:
        return tuple(given or ())
    layers = raw.get("num_hidden_layers")
    check_count("num_hidden_layers", layers)
    check_count("full_attention_interval", interval)
    derived = tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers or 0))
    if given is not None and tuple(given) != derived:
        fix = f"it disagrees with layer_types {shown(given)}; remove the wrong one"
        raise complaint("full_attention_interval", interval, fix)
    return derived
