"""The large weights of stream mixers, which no engine's layer holds."""

from typing import Any

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.hyper_connection import takes_packed
from qwen3next_plugin.kernels.linear import PackedWeight
from qwen3next_plugin.model.linear_attention import Weight
from qwen3next_plugin.model.quantisation.packed import Packed


class MixingWeight(Weight):
    """One of a connection's two large weights, which engines pack once it is loaded."""

    quant_method: Any

    def __init__(self, name: str, *shape: int, config: Qwen3NextConfig) -> None:
        super().__init__(*shape)
        self.name = name
        self.may_be_packed = takes_packed(config.hidden_size)
        self.packed: Packed | None = None

    @property
    def value(self) -> torch.Tensor | PackedWeight:
        """What the kernel takes."""
        return self.weight if self.packed is None else self.packed.weight
