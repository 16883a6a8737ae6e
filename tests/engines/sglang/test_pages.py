"""What state costs: one page a request and linear layer, also under speculation."""

import pytest
import torch

from qwen3next_plugin.model.state import PageLayout

SLOTS, DRAFTS = 9, 3
LAYERS = [0, 1, 2]
LAYOUT = PageLayout(
    num_key_heads=16,
    num_value_heads=32,
    key_dim=128,
    value_dim=128,
    num_drafts=DRAFTS,
    activation_dtype=torch.bfloat16,
    state_dtype=torch.float32,
)


@pytest.fixture
def pool():
    from sglang.srt.configs.mamba_utils import Mamba2StateDType

    from qwen3next_plugin.engines.sglang.state.pages import PageParams, PagePool, PageShape

    return PagePool(
        size=SLOTS,
        spec_state_size=SLOTS,
        cache_params=PageParams(
            shape=PageShape(LAYOUT),
            layers=LAYERS,
            dtype=Mamba2StateDType(conv=torch.bfloat16, temporal=torch.uint8),
        ),
        mamba_layer_ids=LAYERS,
        device="cpu",
        speculative_num_draft_tokens=DRAFTS + 1,
        speculative_eagle_topk=1,
    )


def test_a_pool_is_as_many_pages_as_it_has_slots(pool):
    """No snapshot of a draft beside them, however many drafts there are."""
    from qwen3next_plugin.engines.sglang.state.pages import ALIGNMENT

    padded = -(-LAYOUT.page_bytes // ALIGNMENT) * ALIGNMENT
    assert pool.pages.shape == (len(LAYERS), SLOTS + 1, padded)  # ids begin at 1
    state = 4 * LAYOUT.num_value_heads * LAYOUT.key_dim * LAYOUT.value_dim
    assert state < padded < 0.3 * (DRAFTS + 1) * state  # SGLang: a state for each token verified


@pytest.mark.parametrize("slot", [torch.tensor(2), torch.tensor([2])], ids=["one", "list"])
def test_a_page_that_is_put_aside_comes_back(pool, slot):
    """Though another request has used its slot."""
    pool.pages.fill_(77)
    aside = pool.get_cpu_copy(slot)
    pool.pages.fill_(3)
    pool.load_cpu_copy(aside, slot + 2)
    assert (pool.pages[:, 4] == 77).all()
    assert (pool.pages[:, 2] == 3).all()


def test_a_transfer_finds_where_pages_are(pool):
    """By SGLang's own functions: one buffer a layer, of whole pages."""
    pointers, lengths, of_pages = pool.get_contiguous_buf_infos()
    assert pointers == [pool.pages_of(layer).data_ptr() for layer in LAYERS]
    assert lengths == [pool.pages[0].nbytes] * len(LAYERS)
    assert of_pages == [pool.pages.shape[2]] * len(LAYERS)
    assert pool.get_state_layer_ids() == LAYERS
    assert pool.get_state_conv_shard_groups() == [None] * len(LAYERS)
