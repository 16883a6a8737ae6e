"""Router, experts and the shared expert's gate are transformers' Qwen3NextSparseMoeBlock."""

import pytest
import torch

from checkpoints import BASE
from model.plain import PLAIN, stacked
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.model.moe import SharedExpertGate, SwiGLU, route


def block(**changes):
    """transformers' block with weights of the same scale everywhere."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next import modeling_qwen3_next as modeling

    config = modeling.Qwen3NextConfig(**(BASE | changes))
    layer = modeling.Qwen3NextSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
            parameter /= parameter.shape[-1] ** 0.5
    return config, layer


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("num_experts", "num_experts_per_tok"), [(5, 5), (13, 3)])
@pytest.mark.parametrize("summed_by_the_gate", [False, True])
@torch.inference_mode()
def test_agrees_with_transformers(
    num_experts, num_experts_per_tok, norm_topk_prob, summed_by_the_gate
):
    config, layer = block(
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=norm_topk_prob,
    )
    x = torch.randn(21, config.hidden_size, generator=torch.Generator().manual_seed(4))
    gate = SharedExpertGate(config.hidden_size)
    gate.load_state_dict(layer.shared_expert_gate.state_dict())  # the checkpoint's shape

    weights, experts = route(
        hidden_states=x,
        gating_output=x @ layer.gate.weight.T,
        topk=num_experts_per_tok,
        renormalize=norm_topk_prob,
    )
    routed = fused_moe(
        x=x,
        w13=layer.experts.gate_up_proj,
        w2=layer.experts.down_proj,
        topk_weights=weights,
        topk_ids=experts,
    )
    shared = SwiGLU(
        config.hidden_size,
        config.shared_expert_intermediate_size,
        PLAIN,
        "",
        expert_gate=None if summed_by_the_gate else gate,
    )
    state = stacked(layer.shared_expert.state_dict(), "gate_up_proj", ["gate_proj", "up_proj"])
    shared.load_state_dict(state, strict=summed_by_the_gate)  # the gate has its weight already
    found = gate(x, shared(x), routed) if summed_by_the_gate else routed + shared(x)
    torch.testing.assert_close(found, layer(x[None])[0], rtol=1e-4, atol=1e-5)
