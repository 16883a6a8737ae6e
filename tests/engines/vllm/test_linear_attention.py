"""The linear-attention layer inside vLLM: what is wrong with a page names the layer."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.worker.utils import clear_layer_kv_caches, copy_kv_cache_blocks_inplace

from qwen3next_plugin.engines.vllm.model import linear_attention
from qwen3next_plugin.kernels.step import NULL_SLOT
from qwen3next_plugin.model import gated_delta_net
from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape, GatedDeltaNetWeights
from qwen3next_plugin.model.state import PageLayout, StateError
from qwen3next_plugin.model.step import build_step

PREFIX = "model.layers.6.linear_attn"
LAYOUT = PageLayout(1, 2, 16, 24, 2, torch.float32, torch.float32)
WIDTH = 2 * 16 + 2 * 2 * 24  # of qkvz


def small_layer(**attributes) -> SimpleNamespace:
    """What the layer's methods read of it."""
    weights = GatedDeltaNetWeights(
        conv=torch.randn(LAYOUT.conv_dim, 4),
        A_log=torch.zeros(2),
        dt_bias=torch.zeros(2),
        norm=torch.ones(24),
        norm_eps=1e-6,
    )
    shape = GatedDeltaNetShape(1, 2, 16, 24)
    return SimpleNamespace(prefix=PREFIX, layout=LAYOUT, shape=shape, weights=weights, **attributes)


@pytest.mark.parametrize("span", [(7, 7), (5, 99), (-1, 6), (0, 4)])
def test_a_page_that_does_not_stand_there_names_the_layer(monkeypatch, span):
    raw = torch.full((2, LAYOUT.page_bytes), -1, dtype=torch.int8)
    pool = LAYOUT.view(raw)
    pool.span[1] = torch.tensor(span)
    before = raw.clone()
    step = build_step(
        query_start_loc=torch.tensor([0, 1]),
        seq_lens=torch.tensor([6]),
        slot=torch.tensor([1]),
        num_tokens=1,
        num_slots=2,
        max_query_len=1,
    )
    monkeypatch.setattr(
        linear_attention,
        "get_forward_context",
        lambda: SimpleNamespace(attn_metadata={PREFIX: step}),
    )
    layer = small_layer(pool=pool)
    qkvz, ba = torch.randn(1, WIDTH), torch.randn(1, 4)
    stands = rf"start={span[0]} end={span[1]} .* c=5"
    with pytest.raises(StateError, match=rf"{PREFIX}: row 0: slot 1 holds {stands}") as error:
        linear_attention.GatedDeltaNet.attend(layer, qkvz, ba, torch.empty(1, 2 * 24))
    assert error.value.row == 0
    assert torch.equal(raw, before)


def test_pages_are_let_go_when_vllm_takes_them_back():
    """It binds a small cache to measure with, and empties `kv_cache` to have its memory back."""
    layer = object.__new__(linear_attention.GatedDeltaNet)
    torch.nn.Module.__init__(layer)
    layer.layout = LAYOUT
    layer.conv1d = SimpleNamespace(weight=torch.zeros(layer.layout.conv_dim, 1, 4))
    layer.A_log = layer.dt_bias = torch.zeros(2)
    layer.norm, layer.norm_eps = SimpleNamespace(weight=torch.ones(24)), 1e-6
    pages = torch.zeros(2, 1, 1, layer.layout.page_bytes, dtype=torch.int8)
    layer.bind_kv_cache(pages)
    assert layer.pool.state.untyped_storage().data_ptr() == pages.data_ptr()
    clear_layer_kv_caches([layer])
    assert layer.pool is None
    layer.bind_kv_cache(pages)
    assert layer.pool is not None


@pytest.mark.parametrize("steps", [None, {}, {"another": None}], ids=str)
def test_a_step_without_this_layer_runs_idle(monkeypatch, steps):
    """vLLM tunes its kernels with metadata of the attention layers only, and measures without."""
    context = SimpleNamespace(attn_metadata=steps)
    monkeypatch.setattr(linear_attention, "get_forward_context", lambda: context)
    ran = []

    def attend(**arguments):
        ran.append((arguments["step"].num_tokens, arguments["step"].slot.tolist()))
        gated_delta_net.attend(**arguments)

    monkeypatch.setattr(linear_attention, "attend", attend)
    out = torch.full((3, 48), torch.nan)
    layer = small_layer(max_rows=2)  # vLLM measures before it binds pages
    linear_attention.GatedDeltaNet.attend(layer, torch.ones(3, WIDTH), torch.ones(3, 4), out)
    assert ran == [(3, [NULL_SLOT] * 2)]
    assert (out == 0).all()


@pytest.mark.compat
def test_vllm_copies_a_block_by_its_first_view_only():
    """Fails when vLLM copies all of it: then get_kv_cache_spec may declare the page's own bytes."""
    raw = torch.arange(4 * 8, dtype=torch.int8).view(2, 2, 8)  # two regions of two blocks
    page, kv = raw[0, :, :5], raw[0]  # a state page and the KV that may lie in its place
    copy_kv_cache_blocks_inplace([page, kv], 2, [(0, 1)])
    assert raw[0, 1].tolist() == [0, 1, 2, 3, 4, 13, 14, 15]
