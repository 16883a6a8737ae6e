"""The n-gram embedding of a linear layer, in whose state pages it keeps its own state."""

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context

from qwen3next_plugin.engines.vllm.files import weights_folder
from qwen3next_plugin.engines.vllm.model.host_layers import host_layers
from qwen3next_plugin.engines.vllm.model.linear_attention import GatedDeltaNet
from qwen3next_plugin.engines.vllm.model.opaque import register
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.ple import NgramPool, PerLayerEmbedding, open_table
from qwen3next_plugin.model.state import StateError


class NgramLayer(PerLayerEmbedding):
    """The neutral layer; vLLM finds it by its prefix."""

    def __init__(
        self,
        config: Qwen4ExpConfig,
        vllm_config: VllmConfig,
        prefix: str,
        *,
        i: int,
        linear: GatedDeltaNet,
    ) -> None:
        table = open_table(weights_folder(vllm_config), config, i)
        super().__init__(config, host_layers(vllm_config), prefix, i=i, table=table)
        self.prefix = prefix
        self._linear = (linear,)  # a tuple: it is a part of the decoder layer
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def forward(
        self,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None,
        token_ids: torch.Tensor,
    ) -> None:
        """Shapes: those of `add`."""
        torch.ops.vllm.qwen3next_ngrams(streams_, block, injection, token_ids, self.prefix)

    def run(
        self,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None,
        token_ids: torch.Tensor,
    ) -> None:
        """Run the layer on this step's rows; do nothing where vLLM runs no step.

        Raises:
            StateError: a page that cannot serve the step; names the layer.
        """
        (linear,) = self._linear
        step = (get_forward_context().attn_metadata or {}).get(linear.prefix)
        if step is None:  # profiling and tuning: no pages
            return
        pool = NgramPool.of(linear.parts)
        try:
            self.add(streams_, block, injection, token_ids, pool_=pool, step=step)
        except RuntimeError as error:
            raise StateError(self.prefix, str(error)) from error


def _ngrams(
    streams: torch.Tensor,
    block: torch.Tensor | None,
    injection: torch.Tensor | None,
    token_ids: torch.Tensor,
    layer_name: str,
) -> None:
    """The layer, as an op that is opaque to the compiler."""
    layer = get_forward_context().no_compile_layers[layer_name]
    layer.run(streams, block, injection, token_ids)


register("qwen3next_ngrams", _ngrams, "streams")
