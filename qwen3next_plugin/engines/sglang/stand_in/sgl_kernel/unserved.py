"""Names that SGLang takes on import, for models which the stand-in does not serve."""

from collections.abc import Callable
from typing import NoReturn

import torch

from sgl_kernel.operators import NAMESPACE

UNSERVED = {
    "fused_gdn_gating_cpu": "SGLang's own Gated DeltaNet",
    "fused_sigmoid_gating_delta_rule_update_cpu": "SGLang's own Gated DeltaNet",
    "fused_sigmoid_mul_cpu": "Qwen3.5 and Muse Glimmer",
    "fused_qk_gemma_rmsnorm_cpu": "Qwen3.5",
    "fused_qk_gemma_rmsnorm_with_gate_cpu": "Qwen3.5",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu": "Qwen3.5",
    "fused_moe_router_cpu": "Grok",
    "fused_dual_residual_rmsnorm_cpu": "Grok",
    "rmsnorm_cpu": "Grok",
}


def refused(name: str, model: str) -> Callable[..., NoReturn]:
    """A function of that name that says who asked for it, and what is served."""

    def refuse(*arguments: object, **named: object) -> NoReturn:
        raise NotImplementedError(
            f"sgl_kernel.{name}, which {model} calls: this sgl_kernel is qwen3next_plugin's "
            "stand-in, which serves Qwen3-Next only on a machine without a GPU; another model "
            "needs a build of sgl_kernel for this machine"
        )

    refuse.__name__ = name
    return refuse


for _name, _model in UNSERVED.items():
    setattr(getattr(torch.ops, NAMESPACE), _name, refused(_name, _model))
