"""What state costs: one page a request and linear layer, also under speculation."""

import torch

from qwen3next_plugin.model.state import PageLayout

SLOTS, DRAFTS = 9, 3
LAYERS = [0, 1, 2]


def test_a_pool_is_as_many_pages_as_it_has_slots():
    """No snapshot of a draft beside them, however many drafts there are."""
    from sglang.srt.configs.mamba_utils import Mamba2StateDType

    from qwen3next_plugin.engines.sglang.state.pages import (
        ALIGNMENT,
        PageParams,
        PagePool,
        PageShape,
    )

    layout = PageLayout(
        num_key_heads=16,
        num_value_heads=32,
        key_dim=128,
        value_dim=128,
        num_drafts=DRAFTS,
        activation_dtype=torch.bfloat16,
        state_dtype=torch.float32,
    )
    pool = PagePool(
        size=SLOTS,
        spec_state_size=SLOTS,
        cache_params=PageParams(
            shape=PageShape(layout),
            layers=LAYERS,
            dtype=Mamba2StateDType(conv=torch.bfloat16, temporal=torch.uint8),
        ),
        mamba_layer_ids=LAYERS,
        device="cpu",
        speculative_num_draft_tokens=DRAFTS + 1,
        speculative_eagle_topk=1,
    )
    padded = -(-layout.page_bytes // ALIGNMENT) * ALIGNMENT
    assert pool.pages.shape == (len(LAYERS), SLOTS + 1, padded)  # ids begin at 1
    state = 4 * layout.num_value_heads * layout.key_dim * layout.value_dim
    assert state < padded < 0.3 * (DRAFTS + 1) * state  # SGLang: a state for each token verified
