"""Router, experts and the shared expert's gate are transformers' Qwen3NextSparseMoeBlock."""

import pytest
import torch
from torch import nn

from checkpoints import BASE
from model.plain import PLAIN, stacked
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import pack_bf16, stack
from qwen3next_plugin.model.moe import SharedExpertGate, SwiGLU, route
from qwen3next_plugin.model.quantisation.packing import pack_plain


def block(**changes):
    """transformers' block with weights of the same scale everywhere."""
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


class Adapted(nn.Module):
    """A layer with adapters, which passes on the attributes of the layer, as vLLM's does."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_layer, name)


@torch.inference_mode()
def test_a_packed_shared_expert_is_that_of_its_layers():
    D, S, x = 32, 48, torch.randn(5, 32)
    shared = SwiGLU(D, S, PLAIN, "", expert_gate=SharedExpertGate(D))
    for parameter in shared.parameters():
        parameter.copy_(torch.randn(parameter.shape).bfloat16())
    assert shared.packed() is None
    routed = {
        "w13": stack([pack_bf16(torch.randn(2 * S, D).bfloat16())], 1),
        "w2": stack([pack_bf16(torch.randn(D, S).bfloat16())], 1),
        "topk_weights": torch.rand(5, 1),
        "topk_ids": torch.zeros(5, 1, dtype=torch.int32),
    }
    expected = shared(x, fused_moe(x=x, **routed))
    for layer in (shared.gate_up_proj, shared.down_proj):
        layer.packed = pack_plain(layer.weight.bfloat16())
    found = fused_moe(x=x, **routed, shared=shared.packed())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    shared.down_proj = Adapted(shared.down_proj)
    assert shared.down_proj.packed is not None
    assert shared.packed() is None
