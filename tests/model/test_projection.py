"""A norm and the products that read it give the same, in one op or one by one."""

import pytest
import torch
from torch import nn

from model.plain import PLAIN
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import stack
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.model.moe import PackedMoE, SharedExpertGate, SwiGLU
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.projection import packed_weight, project
from qwen3next_plugin.model.quantisation.packed import Packed, pack_plain

T, D = 5, 32


class Layer(nn.Module):
    """An engine's layer with a packed weight, and what else it may have."""

    def __init__(self, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.packed: nn.Module = pack_plain(torch.randn(outputs, D).bfloat16())
        self.bias = torch.randn(outputs) if bias else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.packed(x, self.bias), None


class Wrapped(nn.Module):
    """A layer with adapters, as vLLM's: it has the attributes of the layer in it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.base_layer = layer

    @property
    def packed(self) -> nn.Module:
        return self.base_layer.packed

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.base_layer(x)[0] + 1, None


class OtherProduct(nn.Module):
    """Not our kernel's, as SGLang's layers have on processors without bf16 instructions."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ self.weight.T


def hooked(layer: Layer) -> Layer:
    layer.register_forward_hook(lambda module, args, out: (out[0] * 2, out[1]))
    return layer


def other(layer: Layer) -> Layer:
    layer.packed = OtherProduct(torch.randn(9, D))
    return layer


NOT_ALONE = {
    "a bias": lambda: Layer(9, bias=True),
    "a hook": lambda: hooked(Layer(9)),
    "wrapped": lambda: Wrapped(Layer(9)),
    "another product": lambda: other(Layer(9)),
}


@pytest.mark.parametrize("second", [*NOT_ALONE, "packed", "none"])
def test_project(second, monkeypatch):
    """Whatever the layers have: the residual is updated once, and each layer gets the norm."""
    layers = [Layer(48)]
    if second != "none":
        layers.append(NOT_ALONE.get(second, lambda: Layer(9))())
    norm = RMSNorm(D, 1e-6)
    norm.weight.data.normal_()
    x, residual = torch.randn(T, D), torch.randn(T, D)
    total = x + residual
    read = norm(total.clone())
    calls = []
    apart = type(layers[0]).forward
    monkeypatch.setattr(Layer, "forward", lambda self, x: calls.append(self) or apart(self, x))
    found = project(norm.before(x, residual), *layers)
    assert bool(calls) == (second in NOT_ALONE)
    assert torch.equal(residual, total)
    for out, layer in zip(found, layers, strict=True):
        assert torch.equal(out, layer(read)[0])
    for out, layer in zip(project(read, *layers), layers, strict=True):
        assert torch.equal(out, layer(read)[0])


@pytest.mark.parametrize("name", NOT_ALONE)
def test_the_weight_of_a_layer_that_does_more(name):
    assert isinstance(packed_weight(Layer(9)), type(Layer(9).packed.weight))
    assert packed_weight(NOT_ALONE[name]()) is None
    assert PackedMoE.of(NOT_ALONE[name](), *experts(), None) is None


def experts():
    w13 = stack([pack_plain(torch.randn(32, D).bfloat16()).weight for _ in range(9)], 9)
    return w13, stack([pack_plain(torch.randn(D, 16).bfloat16()).weight for _ in range(9)], 9)


@torch.inference_mode()
def test_a_packed_mixture_of_experts():
    """The bits of its parts, with a shared expert that is packed; else it is not made."""
    (w13, w2), gate, x = experts(), Layer(9), torch.randn(T, D)
    shared = SwiGLU(D, 48, PLAIN, "", expert_gate=SharedExpertGate(D))
    assert PackedMoE.of(gate, w13, w2, shared) is None
    for layer in (shared.gate_up_proj, shared.down_proj):
        layer.packed = pack_plain(torch.randn(layer.weight.shape).bfloat16())
        assert isinstance(layer.packed, Packed)
    weights, ids = router(logits=gate(x)[0], top_k=3, renormalise=True)
    for of_block in (shared, None):
        packed = PackedMoE.of(gate, w13, w2, of_block)
        wanted = fused_moe(
            x=x, w13=w13, w2=w2, topk_weights=weights, topk_ids=ids,
            shared=None if of_block is None else of_block.packed(),
        )  # fmt: skip
        assert torch.equal(packed(x, top_k=3, renormalise=True), wanted)
