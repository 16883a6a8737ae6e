"""Qwen4-Exp's MTP head, driven by our drafter."""

from sglang.srt.layers.quantization.base_config import QuantizationConfig

from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.engines.sglang.model.mtp import (
    Predictor,
    Qwen3NextForCausalLMMTP,
    make_draft_embedding,
)
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.mtp_head import StreamsMTPHead
from qwen3next_plugin.extras.qwen4_exp.sglang.streams import FIXED, make_streams_layer


class StreamsPredictor(Predictor, StreamsMTPHead):
    """The neutral head, from SGLang's parts."""

    def __init__(
        self, config: Qwen4ExpConfig, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        layers, D = host_layers(quant_config), config.hidden_size
        layer = make_streams_layer(
            config,
            quant_config,
            f"{prefix}.layers.0",
            layer_id=0,
            layer_type="full_attention",
        )
        super().__init__(
            config,
            prefix,
            embed_tokens=make_draft_embedding(config),
            fc_embedding=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_embedding"),
            fc_hidden=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_hidden"),
            layers=[layer],
        )


class Qwen4ExpMTP(Qwen3NextForCausalLMMTP):
    """The drafter as SGLang's registry knows it; its predictor returns a pair."""

    predictor_class = StreamsPredictor
    fixed = FIXED


EntryClass = Qwen4ExpMTP
