"""Qwen3NextConfig: every size of a model of the family.

The family: Qwen3-Next, and Qwen3.5, 3.6 and 3.8, whose configs share one class in transformers.
"""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from qwen3next_plugin import config_checks, config_reading, config_rope
from qwen3next_plugin.config_checks import ConfigError, complaint, missing
from qwen3next_plugin.config_reading import Layout

MAX_SPECULATIVE_TOKENS = 8


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
        values = config_reading.read(given, _names(), override_flag)
        for f in fields(cls):
            if f.default is MISSING and f.name not in values:
                raise missing(f.name)
        values |= {"tp_size": tp_size, "pp_size": pp_size}
        return cls(**values)

    def __post_init__(self) -> None:
        config_checks.check(self)
        config_rope.check(self)

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
    def mrope_section(self) -> tuple[int, ...]:
        """Frequencies that turn by time, height and width, interleaved; () where all turn alike."""
        return tuple(self.rope_parameters.get("mrope_section") or ())

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.rope_parameters["partial_rotary_factor"])

    @property
    def max_length(self) -> int:
        """Positions that RoPE covers: with YaRN, the original ones times its factor."""
        return config_rope.length(self.rope_parameters, self.max_position_embeddings)

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


def _names() -> set[str]:
    return {f.name for f in fields(Qwen3NextConfig)}


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
        raise complaint(name, k, fix)


def check_num_draft_layers(config: Qwen3NextConfig, flag: str) -> None:
    """Raise ConfigError if drafts are asked for, by `flag`, of a model without an MTP layer."""
    if not config.num_nextn_predict_layers:
        raise complaint("mtp_num_hidden_layers", 0, f"there is nothing to draft with; drop {flag}")


def check_kind(folder: Path, override_flag: str) -> None:
    """Refuse a config.json that mixes two kinds of models, or lacks a part of RoPE.

    It is read as it was written: a host's config class keeps only what belongs to its kind, and
    fills in a RoPE that no model was trained with. Raises ConfigError.
    """
    if (folder / "config.json").is_file():
        config_reading.check_kind(read_config(folder), _names(), override_flag)
