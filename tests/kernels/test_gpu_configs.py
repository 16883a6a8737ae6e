"""Choices of the configurations for GPUs."""

import pytest

from qwen3next_plugin.kernels.gpu.configs import CONFIGS


@pytest.mark.parametrize(
    ("arch", "sizes", "splits"),
    [
        ("sm_90", (8, 128, 128), True),  # the released model at TP 4
        ("sm_90", (32, 128, 128), False),  # and at TP 1: processors are busy
        ("gfx942", (32, 128, 128), True),
        ("sm_90", (4, 256, 256), False),  # wider keys than a segment's product has room for
    ],
)
def test_long_rows_are_split_where_it_can_pay(arch, sizes, splits):
    assert CONFIGS[arch].splits(*sizes) == splits
