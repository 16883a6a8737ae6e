"""Our experts' kernel in SGLang's MoE, in place of its loop over experts on a CPU."""

from typing import cast

import torch
from sglang.srt.layers.moe.token_dispatcher import CombineInput, StandardCombineInput
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import use_intel_amx_backend

from qwen3next_plugin.kernels.fused_moe import fused_moe


class NativeExperts(UnquantizedFusedMoEMethod):
    """SGLang's unquantised experts; its AMX kernel is kept where weights were packed for it."""

    def forward_cpu(
        self, layer: torch.nn.Module, dispatch_output: StandardDispatchOutput
    ) -> CombineInput:
        """Shapes: hidden_states [T, D], w13_weight [E, 2I, D], w2_weight [E, D, I]."""
        if use_intel_amx_backend(layer):
            return super().forward_cpu(layer, dispatch_output)
        topk = dispatch_output.topk_output
        return StandardCombineInput(
            hidden_states=fused_moe(
                x=dispatch_output.hidden_states,
                w13=cast(torch.Tensor, layer.w13_weight),
                w2=cast(torch.Tensor, layer.w2_weight),
                topk_weights=topk.topk_weights.float(),
                topk_ids=topk.topk_ids.int(),
            )
        )

    forward_native = forward_cpu  # the name that SGLang calls without AMX
