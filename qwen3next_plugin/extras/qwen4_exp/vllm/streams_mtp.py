"""Qwen4-Exp's MTP head, driven by our drafter."""

from vllm.config import VllmConfig

from qwen3next_plugin.engines.vllm.flags import read_config
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.mtp import (
    Predictor,
    Qwen3NextMTP,
    compiled,
    make_draft_embedding,
)
from qwen3next_plugin.extras.qwen4_exp.config import of_kind
from qwen3next_plugin.extras.qwen4_exp.mtp_head import StreamsMTPHead
from qwen3next_plugin.extras.qwen4_exp.vllm.streams import make_streams_layer


@compiled
class StreamsPredictor(Predictor, StreamsMTPHead):
    """The neutral head, from vLLM's parts."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = of_kind(read_config(vllm_config))
        layers, D = host_layers(vllm_config), config.hidden_size
        super().__init__(
            config,
            prefix,
            embed_tokens=make_draft_embedding(config),
            fc_embedding=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_embedding"),
            fc_hidden=layers.replicated(D, D, bias=False, prefix=f"{prefix}.fc_hidden"),
            layers=(
                make_streams_layer(config, vllm_config, f"{prefix}.layers.{i}", i=None)
                for i in range(config.num_nextn_predict_layers)
            ),
        )


class Qwen4ExpMTP(Qwen3NextMTP):
    """The drafter as vLLM's registry knows it; its `forward` returns a pair."""

    predictor_class = StreamsPredictor
