"""Quantised checkpoints on a CPU by our kernels: SGLang's need AMX, if there are any.

Each layer has the format that the checkpoint's files say.
"""

from pathlib import Path
from typing import Any

from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from torch import nn

from qwen3next_plugin.engines.sglang.cpu.packed_layers import method_for
from qwen3next_plugin.engines.sglang.flags import quantization_config
from qwen3next_plugin.engines.sglang.names import QUANTISATION
from qwen3next_plugin.model.quantisation.files import read_formats
from qwen3next_plugin.model.quantisation.modules import ByFiles
from qwen3next_plugin.model.quantisation.plain import LEAVES_PLAIN


class Quantisation(ByFiles, QuantizationConfig):
    """Every quantised checkpoint of our models, on a CPU."""

    def __init__(self, folder: Path, hf_config: Any) -> None:
        super().__init__()
        self.formats = read_formats(folder, hf_config, quantization_config(hf_config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return method_for(layer, prefix, self.formats.of(prefix))

    # What SGLang asks of a quantisation, besides what both engines do.

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Quantisation":
        raise NotImplementedError("a checkpoint's files say how it is quantised")

    def get_name(self) -> str:
        return QUANTISATION

    def get_scaled_act_names(self) -> list[str]:
        return []


def goes_by_files(config: QuantizationConfig | None) -> bool:
    """Whether a quantisation has read a checkpoint's files."""
    return isinstance(config, ByFiles) or getattr(config, LEAVES_PLAIN, False)
