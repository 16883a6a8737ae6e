"""The state page: its bytes at the released sizes, and its views on raw memory."""

import pytest
import torch

from qwen3next_plugin.model.state import PageLayout


def layout(**changes) -> PageLayout:
    sizes = {
        "num_key_heads": 16,
        "num_value_heads": 32,
        "key_dim": 128,
        "value_dim": 128,
        "num_drafts": 3,
        "activation_dtype": torch.bfloat16,
        "state_dtype": torch.float32,
    }
    return PageLayout(**(sizes | changes))


def test_bytes_at_the_released_sizes_with_three_drafts():
    """At the released shapes: S, the window, the span, and the convolution's inputs."""
    nbytes = layout().nbytes()
    assert nbytes["state"] == 2_097_152
    assert nbytes["key"] + nbytes["u"] + nbytes["g"] == (8 + 3) * 24_704
    assert nbytes["span"] == 8
    assert nbytes["conv"] == (4 + 3) * 8192 * 2
    assert layout().page_bytes == sum(nbytes.values())


def test_a_draft_token_costs_little():
    without = layout(num_drafts=0).page_bytes
    per_token = layout(num_drafts=1).page_bytes - without
    assert per_token == 16 * 128 * 4 + 32 * 128 * 4 + 32 * 4 + 8192 * 2
    assert per_token < 0.02 * without


def test_conv_dim_is_all_of_q_k_and_v():
    assert layout().conv_dim == 8192
    assert layout(num_key_heads=3, num_value_heads=6, key_dim=48, value_dim=16).conv_dim == 384


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("padding", [0, 256])
def test_views_tile_the_page(state_dtype, padding):
    """Every byte of a page belongs to one view; none reaches the padding or the next page."""
    page = layout(
        num_key_heads=3,
        num_value_heads=6,
        key_dim=48,
        value_dim=16,
        activation_dtype=torch.float16,
        state_dtype=state_dtype,
    )
    raw = torch.zeros(3, page.page_bytes + padding, dtype=torch.int8)
    pool = page.view(raw)
    for value, view in enumerate(pool, start=1):
        assert view.data_ptr() >= raw.data_ptr()
        view[1].view(torch.int8).fill_(value)
    assert (raw[1, : page.page_bytes] != 0).all()
    counts = raw[1].bincount()  # of each view's value
    assert dict(zip(pool._fields, counts[1:].tolist(), strict=True)) == page.nbytes()
    assert not raw[[0, 2]].any()
    assert not raw[:, page.page_bytes :].any()


@pytest.mark.parametrize("num_drafts", range(10))
@pytest.mark.parametrize("heads", [(1, 1), (3, 6), (2, 8)], ids=str)
def test_every_part_is_aligned_to_its_element(num_drafts, heads):
    page = layout(
        num_key_heads=heads[0],
        num_value_heads=heads[1],
        key_dim=16,
        value_dim=48,
        num_drafts=num_drafts,
    )
    page.view(torch.zeros(2, page.page_bytes, dtype=torch.int8))  # view(dtype) refuses if not


@pytest.mark.parametrize("num_drafts", range(4))
def test_what_is_loaded_by_the_tile_is_aligned_to_16_bytes(num_drafts):
    """A GPU loads 16 bytes at once only from such an address; with small dims of a rank, too."""
    page = layout(
        num_key_heads=1, num_value_heads=1, key_dim=16, value_dim=48, num_drafts=num_drafts
    )
    pages = page.view(torch.zeros(2, -(-page.page_bytes // 64) * 64, dtype=torch.int8))
    for part in (pages.state, pages.key, pages.u, pages.conv):
        assert (part[1].data_ptr() - pages.state[0].data_ptr()) % 16 == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_value_heads": 24}, "24 value heads cannot share 16 key heads"),
        ({"num_drafts": -1}, "a draft cannot have -1 tokens"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        layout(**changes)
