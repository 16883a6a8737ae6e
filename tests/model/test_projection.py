"""A norm and the products that read it give the same, in one op or one by one."""

import pytest
import torch
from torch import nn

from model.plain import PLAIN
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import stack
from qwen3next_plugin.kernels.router import router
from qwen3next_plugin.kernels.sparse_moe import sparse_moe
from qwen3next_plugin.model import moe
from qwen3next_plugin.model.moe import SharedExpertGate, SwiGLU, packed_moe
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.projection import packed_weight, project
from qwen3next_plugin.model.quantisation.packing import Packed, pack_plain

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


def experts():
    w13 = stack([pack_plain(torch.randn(32, D).bfloat16()).weight for _ in range(9)], 9)
    return w13, stack([pack_plain(torch.randn(D, 16).bfloat16()).weight for _ in range(9)], 9)


@pytest.mark.parametrize("gate", [*NOT_ALONE, "packed"])
@pytest.mark.parametrize("shared", ["packed", "plain", "none"])
@torch.inference_mode()
def test_a_packed_mixture_of_experts(gate, shared, monkeypatch):
    """The bits of its parts; one op if the router and the shared expert are packed."""
    (w13, w2), x = experts(), torch.randn(T, D)
    router_layer = NOT_ALONE.get(gate, lambda: Layer(9))()
    of_block = SwiGLU(D, 48, PLAIN, "", expert_gate=SharedExpertGate(D))
    for layer in (of_block.gate_up_proj, of_block.down_proj):
        layer.packed = pack_plain(torch.randn(layer.weight.shape).bfloat16())
        assert isinstance(layer.packed, Packed)
    if shared == "plain":
        of_block.down_proj.packed = None
    weights, ids = router(logits=router_layer(x)[0], top_k=3, renormalise=True)
    wanted = fused_moe(
        x=x, w13=w13, w2=w2, topk_weights=weights, topk_ids=ids,
        shared=of_block.packed() if shared == "packed" else None,
    )  # fmt: skip
    if shared == "plain":
        wanted = of_block(x, wanted)
    calls = []
    monkeypatch.setattr(moe, "sparse_moe", lambda *a, **k: calls.append(a) or sparse_moe(*a, **k))
    found = packed_moe(
        x, gate=router_layer, w13=w13, w2=w2, top_k=3, renormalise=True,
        shared_expert=None if shared == "none" else of_block,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert bool(calls) == (gate == "packed" and shared != "plain")


def test_a_rank_with_some_experts():
    """Those that it lacks are not run, and nothing is merged: ids are the model's."""
    (w13, w2), gate, x = experts(), Layer(18), torch.randn(T, D)
    expert_map = torch.full((18,), -1, dtype=torch.int32)
    expert_map[9:] = torch.arange(9, dtype=torch.int32)
    weights, ids = router(logits=gate(x)[0], top_k=3, renormalise=True)
    here = ids >= 9
    own = (ids - 9).int().masked_fill(~here, -1)
    wanted = fused_moe(x=x, w13=w13, w2=w2, topk_weights=weights, topk_ids=own)
    found = packed_moe(
        x, gate=gate, w13=w13, w2=w2, shared_expert=None, top_k=3, renormalise=True,
        expert_map=expert_map,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert here.any()
    assert not here.all()
