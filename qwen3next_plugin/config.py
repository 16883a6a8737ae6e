"""Qwen3NextConfig: every size of a model of the family, and every error about a config.

The family: Qwen3-Next, and Qwen3.5, 3.6 and 3.8, whose configs share one class in transformers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TypeGuard

Layout = Literal["grouped", "flat"]  # of a checkpoint; model/weights.py describes both
LAYER_TYPES = ("linear_attention", "full_attention")
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
OLD_SPELLINGS = ("full_attention_interval", "partial_rotary_factor", "rope_scaling", "rope_theta")
# The only value that is served of a field which other models of the kind have.
SERVED = {"attn_output_gate": True, "mtp_use_dedicated_embeddings": False}
CONV_WIDTH = 4
MAX_SPECULATIVE_TOKENS = 8
MAX_HEAD_DIM = 256  # of linear attention


class ConfigError(ValueError):
    """A config that cannot be served; the text names the field, its value and the fix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig:
    """One model on `tp_size` ranks, checked at construction; fields are named as in config.json."""

    layout: Layout = "grouped"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_parameters: Mapping[str, Any] = field(hash=False)
    attention_bias: bool = False
    # linear attention
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    # feed-forward: the sizes of a kind of layer that the model lacks are 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    # head and drafter
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    # where it runs
    tp_size: int = 1
    pp_size: int = 1

    @classmethod
    def from_hf(
        cls,
        hf_config: Any,
        *,
        tp_size: int = 1,
        pp_size: int = 1,
        override_flag: str = "",
    ) -> Self:
        """Read a transformers config or the dict of a config.json.

        Raises:
            ConfigError: the fix names `override_flag`, the engine's flag that overrides values.
        """
        given = dict(hf_config) if isinstance(hf_config, Mapping) else hf_config.to_dict()
        raw = _text_config(given, override_flag)
        values: dict[str, Any] = {"tp_size": tp_size, "pp_size": pp_size}
        values["layout"] = MODEL_TYPES[_model_type(raw)][0]
        values["layer_types"] = _layer_types(raw)
        values["mlp_only_layers"] = tuple(_list(raw, "mlp_only_layers") or ())
        values["rope_parameters"] = _rope_parameters(raw, override_flag)
        for f in fields(cls):
            if f.name in values:
                continue
            if raw.get(f.name) is not None:
                values[f.name] = raw[f.name]
            elif f.default is MISSING:
                raise _missing(f.name)
        return cls(**values)

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_layers(self)
        _check_attention(self)
        _check_feed_forward(self)
        _check_ranks(self)

    # layers
    @property
    def num_linear_layers(self) -> int:
        return self.layer_types.count("linear_attention")

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def num_moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers)))

    def is_linear_layer(self, i: int) -> bool:
        """Whether layer `i` of the trunk is linear attention, not full attention."""
        return self.layer_types[i] == "linear_attention"

    def is_moe_layer(self, i: int) -> bool:
        """Whether layer `i` of the trunk routes to experts, not through one dense MLP."""
        sparse = self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0
        return sparse and i not in self.mlp_only_layers

    # full attention
    @property
    def rope_theta(self) -> float:
        return float(self.rope_parameters["rope_theta"])

    @property
    def mrope_section(self) -> tuple[int, ...]:
        """Frequencies that turn by time, height and width, interleaved; () where all turn alike."""
        return tuple(self.rope_parameters.get("mrope_section") or ())

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    @property
    def attention_dim(self) -> int:
        """Columns of the query, of its output gate, and of o_proj's input."""
        return self.num_attention_heads * self.head_dim

    @property
    def q_proj_size(self) -> int:
        """Query and output gate."""
        return 2 * self.attention_dim

    @property
    def kv_proj_size(self) -> int:
        """Key, or value."""
        return self.num_key_value_heads * self.head_dim

    # linear attention
    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution over [q; k; v]."""
        return 2 * self.key_dim + self.value_dim

    @property
    def in_proj_qkvz_size(self) -> int:
        return self.conv_dim + self.value_dim

    @property
    def in_proj_ba_size(self) -> int:
        return 2 * self.linear_num_value_heads

    # one tensor-parallel rank
    @property
    def num_attention_heads_per_rank(self) -> int:
        return self.num_attention_heads // self.tp_size

    @property
    def num_key_value_heads_per_rank(self) -> int:
        """At least one: with more ranks than key-value heads, ranks hold copies."""
        return max(1, self.num_key_value_heads // self.tp_size)

    @property
    def linear_num_key_heads_per_rank(self) -> int:
        return self.linear_num_key_heads // self.tp_size

    @property
    def linear_num_value_heads_per_rank(self) -> int:
        return self.linear_num_value_heads // self.tp_size

    @property
    def key_dim_per_rank(self) -> int:
        return self.key_dim // self.tp_size

    @property
    def value_dim_per_rank(self) -> int:
        return self.value_dim // self.tp_size

    @property
    def conv_dim_per_rank(self) -> int:
        return self.conv_dim // self.tp_size


def read_config(path: str | Path) -> dict[str, Any]:
    """The dict of a checkpoint folder's config.json; raises ConfigError."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        raise ConfigError(f"{path} is not a folder; give a local checkpoint folder, not a hub name")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file} is missing; give the folder that holds config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}); it is truncated or damaged, fetch it again"
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{file} holds a {type(raw).__name__}, not an object; fetch it again")
    return raw


def check_num_speculative_tokens(k: int, name: str = "num_speculative_tokens") -> None:
    """Raise ConfigError unless `k` draft tokens can be served; `name` is the flag in the text."""
    if type(k) is not int or not 1 <= k <= MAX_SPECULATIVE_TOKENS:
        fix = f"ask for 1 to {MAX_SPECULATIVE_TOKENS}"
        if type(k) is int and k <= 0:
            fix += ", or leave speculation out of the command line to serve without drafts"
        raise _complaint(name, k, fix)


def check_num_draft_layers(config: Qwen3NextConfig, flag: str) -> None:
    """Raise ConfigError if drafts are asked for, by `flag`, of a model without an MTP layer."""
    if not config.num_nextn_predict_layers:
        raise _complaint("mtp_num_hidden_layers", 0, f"there is nothing to draft with; drop {flag}")


def check_kind(folder: Path, override_flag: str) -> None:
    """Refuse a checkpoint whose config.json, as it was written, mixes two kinds of models.

    A host's config class keeps only what belongs to its kind. Raises ConfigError.
    """
    if (folder / "config.json").is_file():
        _model_type(_text_config(read_config(folder), override_flag))


# reading ----------------------------------------------------------------------------------------


def _complaint(name: str, found: object, fix: str) -> ConfigError:
    return ConfigError(f"{name} = {found!r}: {fix}")


def _missing(name: str) -> ConfigError:
    return ConfigError(f"{name} is missing from the config; copy it from the model's release")


def _text_config(given: Mapping[str, Any], override_flag: str) -> dict[str, Any]:
    """The text model's fields, which a model with a vision tower has nested.

    Where both levels have a field they must agree, but for tied embeddings, which transformers
    writes at both levels and reads at either.
    """
    nested = given.get("text_config")
    if nested is None:
        raw = dict(given)
    elif not isinstance(nested, Mapping):
        raise _complaint("text_config", nested, "must be an object, or absent")
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
    if outer != "qwen3_5_mtp" and inner not in (outer, f"{outer}_text"):
        raise _complaint(
            "text_config.model_type", inner, f"model_type is {outer!r}; use one layout"
        )
    names = {f.name for f in fields(Qwen3NextConfig)} | set(OLD_SPELLINGS)
    names -= {"tie_word_embeddings"}
    for name in sorted(names & given.keys()):
        if given[name] is not None and given[name] != raw.get(name):
            path = {"text_config": {name: given[name]}}
            fix = f"{override_flag} '{json.dumps(path)}'".lstrip()
            raise _complaint(
                name,
                given[name],
                f"text_config says {raw.get(name)!r}, and that is what counts; write {fix}",
            )


def _model_type(raw: Mapping[str, Any]) -> str:
    """The model_type, if this plugin serves it, and if it is the one that has these experts."""
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        served = ", ".join(sorted(name for name in MODEL_TYPES if not name.endswith("_mtp")))
        raise _complaint("model_type", model_type, f"this plugin serves {served} only")
    for name, value in SERVED.items():
        if raw.get(name, value) != value:
            raise _complaint(name, raw[name], f"the model is computed with {value} only")
    has_experts, num_experts = MODEL_TYPES[model_type][1], raw.get("num_experts")
    if has_experts and num_experts is None:
        raise _missing("num_experts")
    if has_experts is False and num_experts:
        fix = f"{model_type!r} has dense layers only; with experts it is 'qwen3_5_moe_text'"
        raise _complaint("num_experts", num_experts, fix)
    return model_type


def _list(raw: Mapping[str, Any], name: str) -> list[Any] | None:
    if (value := raw.get(name)) is None:
        return None
    if not isinstance(value, list | tuple):
        raise _complaint(name, value, "must be a list, or absent")
    return list(value)


def _layer_types(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """From `layer_types` or `full_attention_interval`; if both are given, they must agree."""
    given, interval = _list(raw, "layer_types"), raw.get("full_attention_interval")
    if given is None and interval is None:
        raise ConfigError("layer_types and full_attention_interval are missing: write either one")
    if interval is None:
        return tuple(given or ())
    layers = raw.get("num_hidden_layers")
    _check_count("num_hidden_layers", layers)
    _check_count("full_attention_interval", interval)
    derived = tuple(LAYER_TYPES[(i + 1) % interval == 0] for i in range(layers or 0))
    if given is not None and tuple(given) != derived:
        fix = f"it disagrees with layer_types {given!r}; remove the wrong one"
        raise _complaint("full_attention_interval", interval, fix)
    return derived


def _rope_parameters(raw: Mapping[str, Any], override_flag: str) -> dict[str, Any]:
    """`rope_parameters`, or the older `rope_scaling`, completed from the top-level fields."""
    source = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    if not isinstance(given := raw.get(source) or {}, Mapping):
        raise _complaint(source, given, "must be an object, or absent")
    rope = dict(given)
    legacy = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or legacy or "default"
    for name in ("rope_theta", "partial_rotary_factor"):
        inner, outer = rope.get(name), raw.get(name)
        if inner is None and outer is None:
            raise _lost_rope(name, rope, override_flag) if given else _missing(name)
        if None not in (inner, outer) and inner != outer:
            fix = f"{source} says {inner!r}, and that is what counts; override {source} in full"
            raise _complaint(name, outer, fix)
        rope[name] = outer if inner is None else inner
    if rope["rope_type"] == "yarn":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return rope


def _lost_rope(name: str, rope: Mapping[str, Any], override_flag: str) -> ConfigError:
    """The error after an override replaced the whole dict: shows what to write instead."""
    released = {"rope_theta": 10_000_000, "partial_rotary_factor": 0.25}
    full = released | {key: value for key, value in rope.items() if value is not None}
    fix = f"{override_flag} '{json.dumps({'rope_parameters': full})}'".lstrip()
    return ConfigError(
        f"rope_parameters has lost {name}: overriding rope_scaling or rope_parameters replaces all"
        f" of it. Write it in full, with the checkpoint's own values (shown: the released"
        f" models'): {fix}"
    )


# checking ---------------------------------------------------------------------------------------


_MAY_BE_ZERO = (  # _check_feed_forward checks them where the model has such layers
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "intermediate_size",
    "num_nextn_predict_layers",
)


def _check_count(name: str, value: object, least: int = 1) -> None:
    if type(value) is not int or value < least:
        raise _complaint(name, value, f"must be a whole number of at least {least}")


def _check_numbers(c: Qwen3NextConfig) -> None:
    for f in fields(c):
        if f.type is int:
            _check_count(f.name, getattr(c, f.name), least=int(f.name not in _MAY_BE_ZERO))
        elif f.type is bool and not isinstance(value := getattr(c, f.name), bool):
            raise _complaint(f.name, value, "must be true or false")
    if not _is_number(c.rms_norm_eps) or not 0 < c.rms_norm_eps < 1:
        raise _complaint("rms_norm_eps", c.rms_norm_eps, "must be between 0 and 1 (1e-06)")
    if c.hidden_act != "silu":
        raise _complaint("hidden_act", c.hidden_act, "the kernels compute 'silu' only")


def _check_layers(c: Qwen3NextConfig) -> None:
    if unknown := sorted({str(t) for t in c.layer_types if t not in LAYER_TYPES}):
        raise _complaint("layer_types", unknown, f"use {' and '.join(LAYER_TYPES)} only")
    if len(c.layer_types) != c.num_hidden_layers:
        fix = f"num_hidden_layers is {c.num_hidden_layers}; override both together"
        raise _complaint("len(layer_types)", len(c.layer_types), fix)
    for i in c.mlp_only_layers:
        if type(i) is not int or not 0 <= i < c.num_hidden_layers:
            raise _complaint("mlp_only_layers", i, f"layers are 0 to {c.num_hidden_layers - 1}")


def _check_attention(c: Qwen3NextConfig) -> None:
    if c.num_attention_heads % c.num_key_value_heads:
        fix = f"must be a multiple of num_key_value_heads = {c.num_key_value_heads}"
        raise _complaint("num_attention_heads", c.num_attention_heads, fix)
    if c.linear_num_value_heads % c.linear_num_key_heads:
        fix = f"must be a multiple of linear_num_key_heads = {c.linear_num_key_heads}"
        raise _complaint("linear_num_value_heads", c.linear_num_value_heads, fix)
    for name in ("linear_key_head_dim", "linear_value_head_dim"):
        if (dim := getattr(c, name)) % 16 or dim > MAX_HEAD_DIM:
            fix = f"no kernel has it; must be a multiple of 16, at most {MAX_HEAD_DIM}"
            raise _complaint(name, dim, fix)
    if c.linear_conv_kernel_dim != CONV_WIDTH:
        fix = f"the convolution kernels are of width {CONV_WIDTH} only"
        raise _complaint("linear_conv_kernel_dim", c.linear_conv_kernel_dim, fix)
    if c.head_dim % 2:
        raise _complaint("head_dim", c.head_dim, "no kernel has it; must be even")
    _check_rope(c)


def _check_rope(c: Qwen3NextConfig) -> None:
    rope = c.rope_parameters
    partial, theta = rope.get("partial_rotary_factor"), rope.get("rope_theta")
    if not _is_number(partial) or not 0 < partial <= 1:
        raise _complaint("partial_rotary_factor", partial, "must be in (0, 1] (released: 0.25)")
    if not _is_number(theta) or theta <= 0:
        raise _complaint("rope_theta", theta, "must be positive (released: 10000000)")
    if c.rotary_dim % 2 or not c.rotary_dim:
        fix = f"head_dim {c.head_dim} x partial_rotary_factor {partial} must be even, at least 2"
        raise _complaint("rotary_dim", c.rotary_dim, fix)
    if (section := rope.get("mrope_section")) is not None:
        _check_mrope(section, rope.get("mrope_interleaved"), c.rotary_dim // 2)
    if rope.get("rope_type") not in ("default", "yarn"):
        raise _complaint("rope_type", rope.get("rope_type"), "use 'default' or 'yarn'")
    if rope["rope_type"] == "yarn":
        if not _is_number(factor := rope.get("factor")) or factor < 1:
            raise _complaint("rope_parameters.factor", factor, "YaRN needs one of at least 1")
        name = "original_max_position_embeddings"
        _check_count(f"rope_parameters.{name}", rope.get(name))


def _check_mrope(section: object, interleaved: object, frequencies: int) -> None:
    sizes = section if isinstance(section, list | tuple) and len(section) == 3 else ()
    if not all(type(n) is int and n >= 0 for n in sizes) or sum(sizes) != frequencies:
        fix = f"must be three sizes that add up to rotary_dim / 2 = {frequencies}"
        raise _complaint("mrope_section", section, fix)
    if interleaved is not True:
        raise _complaint("mrope_interleaved", interleaved, "must be true")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_feed_forward(c: Qwen3NextConfig) -> None:
    if c.num_moe_layers < c.num_hidden_layers:
        _check_count("intermediate_size", c.intermediate_size)
    if c.num_experts:
        _check_count("moe_intermediate_size", c.moe_intermediate_size)
        _check_count("num_experts_per_tok", c.num_experts_per_tok)
        if c.num_experts_per_tok > c.num_experts:
            fix = f"cannot exceed num_experts = {c.num_experts}"
            raise _complaint("num_experts_per_tok", c.num_experts_per_tok, fix)


def _check_ranks(c: Qwen3NextConfig) -> None:
    names = ("linear_num_key_heads", "linear_num_value_heads", "num_attention_heads")
    for name in names:
        if getattr(c, name) % c.tp_size:
            raise _complaint("tp_size", c.tp_size, f"does not divide {name} = {getattr(c, name)}")
    if c.num_key_value_heads % c.tp_size and c.tp_size % c.num_key_value_heads:
        fix = f"neither divides nor is a multiple of num_key_value_heads = {c.num_key_value_heads}"
        raise _complaint("tp_size", c.tp_size, fix)
    if c.pp_size > c.num_hidden_layers:
        fix = f"more stages than num_hidden_layers = {c.num_hidden_layers}"
        raise _complaint("pp_size", c.pp_size, fix)
