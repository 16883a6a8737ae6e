"""Copies of whole pages: every layer, and nothing else."""

import pytest
import torch

from qwen3next_plugin.kernels.copy_pages import copy_pages

LAYERS, SLOTS = 3, 6


def tensors(source, target, mask):
    return {
        "source": torch.tensor(source, dtype=torch.int32),
        "target": torch.tensor(target, dtype=torch.int64),
        "mask": torch.tensor(mask, dtype=torch.bool),
    }


@pytest.mark.parametrize("size", [8, 64, 8 * 1025])
def test_copies_what_the_mask_says_in_all_layers(backend, size):
    pages = torch.randint(0, 256, (LAYERS, SLOTS, size + 64), dtype=torch.uint8)
    before = pages.clone()
    entries = tensors((1, 4, -1, 3, 5), (2, 0, 3, -1, 3), (True, True, True, True, False))
    copy_pages(pages_=pages[:, :, :size], **entries)
    before[:, 2, :size], before[:, 0, :size] = before[:, 1, :size], before[:, 4, :size]
    assert torch.equal(pages, before)


def test_nothing_to_copy(backend):
    pages = torch.ones(LAYERS, SLOTS, 16, dtype=torch.uint8)
    copy_pages(pages_=pages, **tensors((), (), ()))
    assert (pages == 1).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pages_": torch.ones(2, 3, 12, dtype=torch.uint8)}, "pages_ has shape"),
        ({"pages_": torch.ones(3, 16)}, r"pages_ has shape \(3, 16\), not 3 dims"),
        ({"pages_": torch.ones(2, 3, 16)}, r"pages_ is torch\.float32"),
        ({"mask": torch.ones(1)}, r"mask is torch\.float32"),
        ({"target": torch.ones(2, dtype=torch.int64)}, r"target has shape \(2,\), not \(1,\)"),
        ({"source": torch.ones(1, dtype=torch.int64)}, r"source is torch\.int64"),
    ],
)
def test_refuses(backend, changes, message):
    given = {"pages_": torch.ones(2, 3, 16, dtype=torch.uint8), **tensors((0,), (1,), (True,))}
    with pytest.raises(ValueError, match=f"copy_pages: {message}"):
        copy_pages(**given | changes)
