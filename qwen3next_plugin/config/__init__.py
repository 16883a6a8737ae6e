"""Qwen3NextConfig: a model of the family, read from its config.json and checked.

The family: Qwen3-Next, and Qwen3.5, 3.6 and 3.8, whose configs share one class in transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from qwen3next_plugin.config import checks, reading
from qwen3next_plugin.config.errors import ConfigError, complaint
from qwen3next_plugin.config.files import (
    check_before_engine,
    check_kind,
    check_name,
    is_of_family,
    naming_file,
    quantization_of,
    read_config,
)
from qwen3next_plugin.config.kinds import check_extra
from qwen3next_plugin.config.reading import model_types
from qwen3next_plugin.config.sizes import Layout, Sizes

__all__ = [
    "MAX_SPECULATIVE_TOKENS",
    "ConfigError",
    "Layout",
    "Qwen3NextConfig",
    "check_before_engine",
    "check_extra",
    "check_kind",
    "check_name",
    "check_num_draft_layers",
    "check_num_speculative_tokens",
    "is_of_family",
    "model_types",
    "naming_file",
    "quantization_of",
    "read_config",
]

MAX_SPECULATIVE_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3NextConfig(Sizes):
    """One model on `tp_size` ranks, checked at construction."""

    @classmethod
    def from_hf(
        cls,
        hf_config: Any,
        *,
        tp_size: int = 1,
        pp_size: int = 1,
        override_flag: str = "",
    ) -> Self:
        """Read a transformers config or the dict of a config.json; of a kind with a class, as that.

        Raises:
            ConfigError: the fix names `override_flag`, the engine's flag that overrides values.
        """
        given = hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict()
        kind, values = reading.read(given, override_flag)
        config = cls if kind is None else kind.config
        return config(**values | {"tp_size": tp_size, "pp_size": pp_size})

    def __post_init__(self) -> None:
        checks.check(self)


def check_num_speculative_tokens(num_drafts: int, name: str = "num_speculative_tokens") -> None:
    """Raise ConfigError unless so many draft tokens can be served; its text names the flag."""
    if type(num_drafts) is not int or not 1 <= num_drafts <= MAX_SPECULATIVE_TOKENS:
        fix = f"ask for 1 to {MAX_SPECULATIVE_TOKENS}"
        if type(num_drafts) is int and num_drafts <= 0:
            fix += ", or leave speculation out of the command line to serve without drafts"
        raise complaint(name, num_drafts, fix)


def check_num_draft_layers(config: Qwen3NextConfig, flag: str) -> None:
    """Raise ConfigError if drafts are asked for, by `flag`, of a model without an MTP layer."""
    if not config.num_nextn_predict_layers:
        raise complaint("mtp_num_hidden_layers", 0, f"there is nothing to draft with; drop {flag}")
