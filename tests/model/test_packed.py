"""Packed weights are what their buffers hold; layers pack what an engine has loaded."""

import pytest
import torch
from torch import nn

from qwen3next_plugin.kernels.linear import linear, pack_bf16, pack_int8, unpack
from qwen3next_plugin.model.quantisation.format import BF16, Format
from qwen3next_plugin.model.quantisation.layers import (
    ExpertsMethod,
    LinearMethod,
    each_layer,
)
from qwen3next_plugin.model.quantisation.packing import EXPERTS_WEIGHTS, Packed, Packer

VALUES = torch.randint(-127, 128, (48, 64), generator=torch.Generator().manual_seed(0))
WEIGHTS = {
    "bf16": pack_bf16(VALUES.bfloat16()),
    "int8": pack_int8(VALUES.to(torch.int8), torch.rand(48, 1)),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_the_bundle_follows_the_buffers(weight):
    packed = Packed(weight)
    assert packed.weight is packed.weight  # not made again for each product
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = linear(x, weight)
    packed._apply(lambda tensor: tensor.clone())
    for name, buffer in packed.named_buffers():
        assert getattr(packed.weight, name) is buffer
    assert torch.equal(packed(x), expected)
    packed.to("meta")
    assert packed.weight.packed.is_meta


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_a_trace_takes_the_buffers(weight):
    """Their sizes are constants in a graph; those of other tensors would be unknown."""
    packed, graphs = Packed(weight), []
    compiled = torch.compile(packed, backend=lambda g, _: graphs.append(g) or g, dynamic=True)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(compiled(x), packed(x))
    inputs = [node for node in graphs[0].graph.nodes if node.op == "placeholder"]
    shapes = [node.meta["example_value"].shape for node in inputs[1:]]
    assert weight.packed.shape in shapes


def fill(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Random values in every parameter, as an engine would load them; scales are positive."""
    for parameter in layer.parameters():
        is_float, shape = parameter.is_floating_point(), parameter.shape
        parameter.data.copy_(torch.rand(shape) if is_float else torch.randint(0, 16, shape))
    return {name: parameter.data.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize(
    ("form", "by_column"),
    [
        (Format("int8", 0, torch.float32), {"weight"}),
        (Format("int4", 32, torch.float16, zeros=True), {"weight", "weight_scale", "weight_zero"}),
        (Format("nvfp4", 16, torch.float8_e4m3fn), {"weight", "weight_scale"}),
        (Format("mxfp4", 32, torch.float8_e8m0fnu), {"weight", "weight_scale"}),
    ],
    ids=["int8", "int4", "nvfp4", "mxfp4"],
)
def test_a_projection_is_loaded_in_its_format_and_packed_once(form, by_column):
    layer, method = nn.Module(), LinearMethod("m", form)
    method.create_weights(layer, 64, [16, 24], 64, 40, torch.float32, weight_loader=len)
    loaded = dict(layer.named_parameters())
    assert {name: tuple(t.shape) for name, t in loaded.items()} == {
        name: shape for name, (shape, _) in form.tensors(40, 64).items()
    }
    assert all(t.weight_loader is len and t.output_dim == 0 for t in loaded.values())
    assert {name for name, t in loaded.items() if hasattr(t, "input_dim")} == by_column
    fill(layer)
    method.process_weights_after_loading(layer)
    packed = layer.packed
    method.process_weights_after_loading(layer)
    assert layer.packed is packed
    assert not [*layer.named_parameters()]
    x, bias = torch.randn(3, 64), torch.randn(40)
    assert torch.equal(method.apply(layer, x, bias), linear(x, packed.weight) + bias)


@pytest.mark.parametrize("as_int8", [False, True])
def test_experts_are_packed_as_asked(as_int8):
    layer, method = nn.Module(), ExpertsMethod("m", {"w13": BF16, "w2": BF16}, 32)
    method.create_weights(layer, 3, 48, 32, torch.bfloat16, weight_loader=len)
    weights = fill(layer)
    assert {n: t.shape for n, t in weights.items()} == {
        "w13_weight": (3, 64, 48),
        "w2_weight": (3, 48, 32),
    }
    assert layer.w2_weight.quant_method == "channel"
    method.as_int8 = as_int8
    method.process_weights_after_loading(layer)
    for which in ("w13", "w2"):
        packed, weight = getattr(layer, f"{which}_packed"), weights[f"{which}_weight"].float()
        assert packed.encoding == ("int8" if as_int8 else "bf16")
        step = weight.abs().amax(-1, keepdim=True) / 127 * as_int8
        assert ((unpack(packed.weight) - weight).abs() <= 0.51 * step).all()
    out = method.multiply(layer, torch.randn(2, 48), torch.ones(2, 1), torch.tensor([[0], [2]]))
    assert out.shape == (2, 48)


class AllHere(ExpertsMethod):
    """Of a rank that has every expert."""

    def may_pack(self, layer: nn.Module) -> bool:
        return True


@pytest.mark.parametrize(
    "form",
    [
        BF16,
        Format("int8", 0, torch.float32),
        Format("int4", 32, torch.float16, zeros=True),
        Format("nvfp4", 16, torch.float8_e4m3fn),
    ],
    ids=lambda form: form.encoding,
)
def test_experts_that_are_packed_one_by_one_are_the_same(form):
    """In an MTP layer, in any order; each gives the memory of its weight back."""
    found = []
    for method in (AllHere("m", {"w13": form, "w2": form}, 128), None):
        method = method or ExpertsMethod("m", {"w13": form, "w2": form}, 128)
        torch.manual_seed(0)
        model, layer = nn.ModuleDict({"mlp": nn.Module()}), nn.Module()
        model["mlp"].experts, layer.quant_method = layer, method
        method.as_int8 = True
        method.create_weights(layer, 3, 192, 128, torch.bfloat16, weight_loader=len)
        fill(layer)
        if isinstance(method, AllHere):
            for expert in (2, 0, 1):
                Packer(nn.ModuleDict({"layer": model})).end(f"layer.mlp.experts.{expert}")
                middle = layer.w2_weight[expert].flatten().view(torch.uint8)
                page = (len(middle) // 2) & ~4095
                assert len(middle) < 3 * 4096 or not middle[page : page + 64].any()
        Packer(model).end("mlp")
        assert not [*layer.named_parameters()]
        found.append([layer.w13_packed.weight, layer.w2_packed.weight])
    for one, other in zip(*found, strict=True):
        assert (one.encoding, one.group, one.shape) == (other.encoding, other.group, other.shape)
        assert one.tensors.keys() == other.tensors.keys()
        assert all(map(torch.equal, one.tensors.values(), other.tensors.values()))


def test_experts_are_loaded_into_the_memory_of_packed_ones():
    """Of the same sizes; what was packed of it stays."""
    form = Format("int4", 32, torch.float16, zeros=True)
    model, method = nn.ModuleDict(), ExpertsMethod("m", {"w13": form, "w2": form}, 128)
    for name, columns in {"a": 192, "b": 192, "c": 256}.items():
        model[name] = nn.Module()
        model[name].quant_method = method
        method.create_weights(model[name], 3, columns, 128, torch.bfloat16, weight_loader=len)
    packer, packed = Packer(model), {}
    fill(model["a"])
    before = {name: model["a"].get_parameter(name).data_ptr() for name in EXPERTS_WEIGHTS}
    packer.end("a")
    for weight in (model["a"].w13_packed, model["a"].w2_packed):
        packed |= {each: each.clone() for each in weight.weight.tensors.values()}
    for name in "bc":
        packer.begin(name)
        packer.begin(f"{name}.mlp.experts.0")
        same = [model[name].get_parameter(each).data_ptr() for each in EXPERTS_WEIGHTS]
        assert (same == [*before.values()]) == (name == "b")
        fill(model[name])
    assert all(torch.equal(each, copy) for each, copy in packed.items())
    packer.end("c")
    assert packer.free
    packer.end("b")
    assert not packer.free  # nobody waits for it


def test_an_expert_that_is_missing_is_an_error():
    layer, method = nn.Module(), AllHere("m", {"w13": BF16, "w2": BF16}, 32)
    method.as_int8 = True
    method.create_weights(layer, 3, 48, 32, torch.bfloat16, weight_loader=len)
    fill(layer)
    method.pack_expert(layer, 1)
    with pytest.raises(ValueError, match="1 matrices of 3 experts"):
        method.process_weights_after_loading(layer)


def test_experts_have_scales_by_group_and_by_channel():
    form = Format("nvfp4", 16, torch.float8_e4m3fn)
    layer, method = nn.Module(), ExpertsMethod("m", {"w13": form, "w2": form}, 32)
    method.create_weights(layer, 3, 48, 32, torch.bfloat16, weight_loader=len)
    fill(layer)
    assert layer.w2_weight_scale.quant_method == "group"
    assert layer.w2_weight_channel_scale.quant_method == "channel"
    assert layer.w13_weight_channel_scale.shape == (3, 64, 1)
    method.process_weights_after_loading(layer)
    assert layer.w13_packed.shape == (3, 64, 48)


def test_layers_that_draft_become_int8_but_for_routers():
    model = nn.ModuleDict({"fc": nn.Identity(), "layer": nn.ModuleDict()})
    model["layer"].update({"o_proj": nn.Identity(), "gate": nn.Identity()})
    chosen = [layer for layer, as_int8 in each_layer(model, model["layer"]) if as_int8]
    assert chosen == [model["layer"], model["layer"]["o_proj"]]
    assert not any(as_int8 for _, as_int8 in each_layer(model, None))
