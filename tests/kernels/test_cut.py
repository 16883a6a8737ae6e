"""A part of a packed weight is what packing that part gives, bit for bit."""

import pytest
import torch
from test_linear import KINDS, PACK, checkpoint
from torch import Tensor

from qwen3next_plugin.kernels.linear import cut, pack_int8, unpack
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight

CHANNELS = {
    "whole": [(0, 56)],
    "panels": [(16, 48)],
    "two runs of panels": [(0, 16), (32, 48)],
    "no panels": [(4, 20), (30, 33)],
    "beyond the last": [(32, 80)],
}
COLUMNS = [(0, 384), (0, 128), (128, 384), (256, 384)]


def part(parts: dict[str, Tensor], channels, columns) -> dict[str, Tensor]:
    """What a checkpoint would have of these channels and columns."""
    rows = torch.cat([torch.arange(start, min(stop, 56)) for start, stop in channels])

    def of(tensor: Tensor) -> Tensor:
        start, stop = (bound * tensor.shape[-1] // 384 for bound in columns)
        found = tensor[..., rows, :]
        return found if tensor.shape[-1] == 1 else found[..., start:stop]

    return {name: of(tensor) for name, tensor in parts.items()}


def same(found: PackedWeight, expected: PackedWeight) -> None:
    for field in ("encoding", "group", "shape"):
        assert getattr(found, field) == getattr(expected, field)
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name
        assert found.tensors[name].is_contiguous()


@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("lead", [(), (3,)], ids=["matrix", "experts"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_what_packing_it_gives(kind, lead, columns, channels):
    parts, plain = checkpoint(kind, *lead, 56, 384)
    if kind == "fp8-blocks":  # a row for each channel
        parts["scale"] = parts["scale"].repeat_interleave(128, -2)[..., :56, :]
    pack = PACK[KINDS[kind][0]]
    found = cut(pack(**parts), channels, columns)
    if channels[-1][1] > 56:
        assert found.shape[-2] == 48
        expected = torch.nn.functional.pad(plain[..., 32:, slice(*columns)], (0, 0, 0, 24))
        assert torch.equal(unpack(found), expected)
    else:
        same(found, pack(**part(parts, channels, columns)))


def test_whole_panels_share_memory():
    parts, _ = checkpoint("int4-group-64-bf16", 64, 256)
    weight = PACK["int4"](**parts)
    found = cut(weight, [(0, 16), (16, 32)], (0, 256))
    assert found.packed.data_ptr() == weight.packed.data_ptr()
    assert cut(weight, [(0, 64)], (0, 256)) is weight


def test_columns_that_share_a_scale_stay_together():
    weight = pack_int8(torch.ones(16, 256, dtype=torch.int8), torch.ones(16, 2))
    with pytest.raises(ValueError, match=r"cut: columns 0 to 64 of int8 .* 128 stay together"):
        cut(weight, [(0, 16)], (0, 64))
