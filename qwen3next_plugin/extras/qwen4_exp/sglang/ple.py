"""The n-gram embedding of a linear layer, in whose state pages it keeps its own state."""

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_server_args

from qwen3next_plugin.engines.sglang.files import weights_folder
from qwen3next_plugin.engines.sglang.model.host_layers import host_layers
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.ple import NgramPool, PerLayerEmbedding, open_table


class NgramLayer(PerLayerEmbedding):
    """The neutral layer. SGLang's backend (state/steps.py) has its state pages."""

    def __init__(
        self,
        config: Qwen4ExpConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        layer_id: int,
    ) -> None:
        table = open_table(weights_folder(get_server_args()), config, layer_id)
        super().__init__(config, host_layers(quant_config), prefix, i=layer_id, table=table)
        self.prefix, self.layer_id = prefix, layer_id

    def forward(
        self,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None,
        token_ids: torch.Tensor,
    ) -> None:
        """Run the layer on this step's rows. Shapes: those of `add`.

        Raises:
            StateError: a page that cannot serve the step; names request and layer.
        """
        backend = get_attn_backend().linear_attn_backend
        pool = NgramPool.of(backend.parts[self.layer_id])
        try:
            self.add(streams_, block, injection, token_ids, pool_=pool, step=backend.step)
        except RuntimeError as error:
            raise backend.state_error(self.prefix, error) from error
