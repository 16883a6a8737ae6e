"""A packed weight is what its buffers hold, wherever they are moved."""

import pytest
import torch

from qwen3next_plugin.kernels.linear import linear, pack_bf16, pack_int8
from qwen3next_plugin.model.packed import Packed

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
