"""Hyper-connections: a residual of several streams, and the decoder layer between them.

A block's output is not added at once, but by whatever reads the streams next: so both are done in
one pass over them.
"""

from typing import Any

import torch
from torch import nn

from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.mixing import MixingWeight
from qwen3next_plugin.kernels.hyper_connection import HyperConnectionWeights, hyper_connection
from qwen3next_plugin.model.decoder_layer import Blocks
from qwen3next_plugin.model.linear_attention import Weight


class HyperConnection(nn.Module):
    """What is before a block, or with `injects=False` after the last one."""

    def __init__(self, config: Qwen4ExpConfig, prefix: str, *, injects: bool = True) -> None:
        super().__init__()
        wide, rank = config.hc_count * config.hidden_size, config.hc_lowrank
        self.eps = config.rms_norm_eps
        self.hc_norm = Weight(wide)
        name = f"{prefix}.input_mix_weight"
        self.input_mix_weight_down = MixingWeight(f"{name}_down", rank, wide, config=config)
        self.input_mix_weight_up = MixingWeight(f"{name}_up", wide, rank, config=config)
        self.block_inject_weight = Weight(config.hc_count, wide) if injects else None

    def forward(
        self,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inject the last block's output into the streams; what the next one reads, and its gates.

        Shapes:
            streams_ [T, hc, D], block [T, D], injection [T, hc]; returns [T, D] and [T, hc]
        """
        inject = self.block_inject_weight
        weights = HyperConnectionWeights(
            norm=self.hc_norm.weight,
            down=self.input_mix_weight_down.value,
            up=self.input_mix_weight_up.value,
            inject=None if inject is None else inject.weight,
        )
        return hyper_connection(
            streams_=streams_, weights=weights, eps=self.eps, block=block, injection=injection
        )


class StreamsLayer(Blocks):
    """One decoder layer, with the n-gram embedding that a linear one may have before it."""

    def __init__(
        self,
        config: Qwen4ExpConfig,
        prefix: str,
        *,
        layer_type: str,
        mixer: nn.Module,
        mlp: nn.Module,
        ple: nn.Module | None = None,
    ) -> None:
        super().__init__(layer_type=layer_type, mixer=mixer, mlp=mlp)
        self.ple = ple
        self.attn_hyper_connection = HyperConnection(config, f"{prefix}.attn_hyper_connection")
        self.mlp_hyper_connection = HyperConnection(config, f"{prefix}.mlp_hyper_connection")

    def forward(
        self,
        positions: torch.Tensor,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None,
        token_ids: torch.Tensor,
        *batch: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layer; `batch` as in `mix`.

        Shapes:
            positions [T] or [3, T], token_ids [T], streams_ [T, hc, D]; block and injection, of the
            layer before and returned: [T, D], [T, hc]
        """
        if self.ple is not None:
            self.ple(streams_, block, injection, token_ids)
            block = injection = None
        x, injection = self.attn_hyper_connection(streams_, block, injection)
        block = self.mix(positions, x, *batch)
        x, injection = self.mlp_hyper_connection(streams_, block, injection)
        return self.mlp(x), injection


def no_streams(embeds: torch.Tensor, count: int) -> torch.Tensor:
    """Streams before anything is added. Shapes: embeds [T, D], returns [T, count, D]."""
    return embeds.new_zeros(len(embeds), count, embeds.shape[1])
