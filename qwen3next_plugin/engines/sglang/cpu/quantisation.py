"""Quantised checkpoints on a CPU, for which SGLang has kernels for AMX at best: by ours.

Each layer has the format that the checkpoint's files say.
"""

from pathlib import Path
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from torch import nn

from qwen3next_plugin.engines.sglang.flags import quantisation
from qwen3next_plugin.engines.sglang.names import QUANTISATION
from qwen3next_plugin.model.as_stored import AS_STORED
from qwen3next_plugin.model.checkpoint.quantised import read_formats
from qwen3next_plugin.model.formats import Formats


class Quantisation(QuantizationConfig):
    """Every quantised checkpoint of our models, on a CPU."""

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__()
        self.formats = read_formats(folder, hf_config, quantisation(hf_config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from qwen3next_plugin.engines.sglang.cpu.packed import method

        return method(layer, prefix, self.formats.of(prefix))

    # What SGLang asks of a quantisation.

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Quantisation":
        raise NotImplementedError("a checkpoint's files say how it is quantised")

    def get_name(self) -> str:
        return QUANTISATION

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_scaled_act_names(self) -> list[str]:
        return []


def goes_by_files(config: QuantizationConfig | None) -> bool:
    """Whether a quantisation has read a checkpoint's files."""
    return isinstance(config, Quantisation) or getattr(config, AS_STORED, False)


def formats(config: QuantizationConfig | None) -> Formats | None:
    """What a model loads by; None: SGLang's kernels take the tensors as they are."""
    return config.formats if isinstance(config, Quantisation) else None
