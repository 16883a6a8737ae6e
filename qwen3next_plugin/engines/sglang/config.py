"""The config of a model of ours, as SGLang has read it."""

from typing import Any

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.sglang.names import OVERRIDE_FLAG


def read_config(hf_config: Any, tp_size: int) -> Qwen3NextConfig:
    """The model's config on this many ranks; raises ConfigError where it cannot be served."""
    return Qwen3NextConfig.from_hf(hf_config, tp_size=tp_size, override_flag=OVERRIDE_FLAG)


def quantization_config(hf_config: Any) -> dict[str, Any] | None:
    """What config.json says of how the checkpoint is quantised."""
    for config in (hf_config, hf_config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if found := getattr(config, name, None):
                return found
    return None
