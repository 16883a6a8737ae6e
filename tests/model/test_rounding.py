"""int4 at load: the scales of a search, against every scale of a fine grid."""

import pytest
import torch

from qwen3next_plugin.model.quantisation.at_load import quantise
from qwen3next_plugin.model.quantisation.format import Format, dequantise

GROUP = 32
INT4 = Format("int4", GROUP, torch.bfloat16)


def error(weight, scale):
    """Squared error of each group [..., G] by a scale of each."""
    grouped, scale = weight.unflatten(1, (-1, GROUP)), scale.bfloat16().float()[..., None]
    return ((grouped / scale).round().clamp(-8, 7) * scale - grouped).square().sum(-1)


def largest(weight):
    """The largest of each group, with its sign."""
    grouped = weight.unflatten(1, (-1, GROUP))
    return grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)


@pytest.mark.parametrize("tails", [False, True])
def test_squared_error_is_nearly_the_least_possible(tails):
    """Within 7 %, and below that of scales by the largest weight."""
    torch.manual_seed(0)
    weight = torch.randn(50, 5 * GROUP)
    weight = weight * weight.abs() if tails else weight
    whole = largest(weight) / -8
    grid = torch.cat([torch.linspace(0.4, 1.2, 160), torch.linspace(-1.2, -0.4, 160)])
    least = torch.stack([error(weight, reach * whole) for reach in grid]).amin(0).sum()
    found = (dequantise(quantise(weight, INT4), INT4) - weight).square().sum()
    assert least <= found <= 1.07 * least
    assert found <= 0.97 * error(weight, whole).sum()


def test_weights_of_four_bits_stay():
    """Whichever sign the largest has; also a group of zeros."""
    torch.manual_seed(2)
    steps = torch.randint(-7, 8, (6, 3 * GROUP)).float()
    steps[:, ::GROUP] = -8
    steps[5, :GROUP] = 0
    weight = steps * torch.tensor([1.0, -1.0, 0.5, -2.0, 2**-20, 1.0])[:, None]
    assert torch.equal(dequantise(quantise(weight, INT4), INT4), weight)


def test_weights_stored_in_fp64():
    torch.manual_seed(3)
    weight = torch.randn(4, 2 * GROUP)
    expected = quantise(weight, INT4)
    for name, tensor in quantise(weight.double(), INT4).items():
        assert torch.equal(tensor, expected[name]), name
