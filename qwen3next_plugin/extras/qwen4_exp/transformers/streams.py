"""transformers' Qwen4-Exp (Qwen3.8-Flash-Next) with its MTP head, for texts."""

from typing import Any

from torch import Tensor
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpForCausalLM as HostQwen4Exp

from qwen3next_plugin import env
from qwen3next_plugin.engines.transformers import flags
from qwen3next_plugin.engines.transformers.model.trunk import WithMTP
from qwen3next_plugin.extras.qwen4_exp.tensors import TABLE_SCALE
from qwen3next_plugin.extras.qwen4_exp.transformers.cache import StreamsCache
from qwen3next_plugin.extras.qwen4_exp.transformers.streams_mtp import StreamsPredictor
from qwen3next_plugin.model.checkpoint.errors import CheckpointError


class Qwen4ExpForCausalLM(WithMTP, HostQwen4Exp):
    """Its text model. The MTP head reads the streams before the trunk's last mixer."""

    host = HostQwen4Exp
    cache_class = StreamsCache

    def __init__(self, config: Any) -> None:
        if env.batch_invariant():
            raise flags.RequestError(
                f"{flags.INVARIANT}: transformers does not compute Qwen4-Exp with the engines' "
                f"bits; unset it, or use vLLM"
            )
        super().__init__(config)

    def _make_mtp(self, config: Any) -> StreamsPredictor:
        return StreamsPredictor(
            config, layer=type(self.model.layers[0]), mixer=type(self.model.hyper_connection_mixer)
        )

    def run_trunk(self, **given: Any) -> tuple[Tensor, Tensor]:
        """Shapes: returns [B, n, D] and [B, n, hc·D]"""
        seen: list[Tensor] = []
        mixer = self.model.hyper_connection_mixer
        hook = mixer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            hidden, _ = super().run_trunk(**given)
        finally:
            hook.remove()
        return hidden, seen[0]

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a table in FP8: the host would read its rows without their scale.

        Raises: CheckpointError
        """
        super()._adjust_missing_and_unexpected_keys(loading_info)
        if found := [key for key in loading_info.unexpected_keys if key.endswith(TABLE_SCALE)]:
            raise CheckpointError(
                f"{found[0]}: transformers reads no table of n-grams in FP8; serve the checkpoint "
                f"under vLLM or SGLang"
            )
