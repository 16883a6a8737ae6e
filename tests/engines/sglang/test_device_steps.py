"""Steps on a GPU under SGLang: what their tensors say, what a graph keeps, where it is cut."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from qwen3next_plugin.model.gated_delta_net import GatedDeltaNetShape, GatedDeltaNetWeights
from qwen3next_plugin.model.state import PageLayout
from qwen3next_plugin.model.step import NULL_SLOT

H, HV, K, V = 1, 2, 16, 16
LAYERS = [0, 2]
SLOT_OF = torch.tensor([0, 4, 2, 5])  # of a request, by its row in SGLang's table


@pytest.fixture
def backend():
    """On pages of two layers of 8 slots, for 4 requests and 2 drafts each."""
    from sglang.srt.configs.mamba_utils import Mamba2StateDType

    from qwen3next_plugin.engines.sglang.state.device_steps import DeviceGatedDeltaNetBackend
    from qwen3next_plugin.engines.sglang.state.pages import PageParams, PagePool, PageShape

    layout = PageLayout(
        num_key_heads=H,
        num_value_heads=HV,
        key_dim=K,
        value_dim=V,
        num_drafts=2,
        activation_dtype=torch.float32,
        state_dtype=torch.float32,
    )
    dtype = Mamba2StateDType(conv=torch.float32, temporal=torch.uint8)
    pool = PagePool(
        size=7,
        spec_state_size=0,
        cache_params=PageParams(shape=PageShape(layout), layers=LAYERS, dtype=dtype),
        mamba_layer_ids=LAYERS,
        device="cpu",
        speculative_eagle_topk=1,
    )
    pool.pages.zero_()
    tables = SimpleNamespace(
        mamba_pool=pool, size=4, get_mamba_indices=lambda requests: SLOT_OF[requests]
    )
    layers = [SimpleNamespace(is_linear=i in LAYERS, linear_attn=layer(i)) for i in range(3)]
    model = SimpleNamespace(model=SimpleNamespace(layers=layers))
    runner = SimpleNamespace(req_to_token_pool=tables, device="cpu", model=model)
    return DeviceGatedDeltaNetBackend(runner)


def layer(layer_id):
    return SimpleNamespace(
        layer_id=layer_id,
        shape=GatedDeltaNetShape(H, HV, K, V),
        weights=GatedDeltaNetWeights(
            conv=torch.randn(2 * H * K + HV * V, 4),
            A_log=torch.zeros(HV),
            dt_bias=torch.zeros(HV),
            norm=torch.ones(V),
            norm_eps=1e-6,
        ),
    )


def projections(T):
    return torch.randn(T, 2 * H * K + 2 * HV * V), torch.randn(T, 2 * HV)


def batch(mode, requests, seq_lens, **given):
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=len(requests),
        req_pool_indices=torch.tensor(requests),
        seq_lens=torch.tensor(seq_lens),
        **given,
    )


def test_a_decode_and_the_rows_that_fill_a_graph(backend):
    """The last two of the graph's rows still hold what an earlier batch had there."""
    backend.init_forward_metadata_out_graph(
        batch(ForwardMode.DECODE, (3, 1, 2, 1), (9, 1, 7, 7), num_padding=2)
    )
    assert backend.step.slot.tolist() == [5, 4, NULL_SLOT, NULL_SLOT]
    assert backend.step.context_len.tolist()[:2] == [8, 0]
    assert backend.step.query_start_loc.tolist() == [0, 1, 2, 3, 4]
    assert (backend.step.num_tokens, backend.step.max_query_len) == (4, 1)


def test_a_verification(backend):
    """Its lengths do not count the drafts."""
    spec_info = SimpleNamespace(draft_token_num=3, tree_topk=1)
    backend.init_forward_metadata(
        batch(ForwardMode.TARGET_VERIFY, (2, 3), (10, 20), spec_info=spec_info)
    )
    assert backend.step.slot.tolist() == [2, 5]
    assert backend.step.context_len.tolist() == [10, 20]
    assert backend.step.query_start_loc.tolist() == [0, 3, 6]
    assert (backend.step.num_tokens, backend.step.max_query_len) == (6, 3)


def test_what_a_graph_captured_stays_where_it_is(backend):
    """SGLang captures on requests that are nobody's; larger graphs first, so room for all first."""
    backend.init_cuda_graph_state(6, 6)
    mask, target = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    given = {"mamba_track_mask": mask, "mamba_track_indices": target}
    backend.init_forward_metadata_out_graph(
        batch(ForwardMode.DECODE, (0, 0, 0), (1, 1, 1), **given), in_capture=True
    )
    captured, copies = backend.step, backend.copies
    assert captured.slot.tolist() == [NULL_SLOT] * 3
    assert (copies.source, copies.mask, copies.target) == (captured.slot, mask, target)
    backend.init_forward_metadata_out_graph(
        batch(ForwardMode.DECODE, (1, 2, 3), (5, 6, 7), num_padding=0)
    )
    assert captured.slot.tolist() == copies.source.tolist() == [4, 2, 5]
    assert captured.context_len.tolist() == [4, 5, 6]


def test_pages_are_kept_where_the_mask_says_after_the_last_layer(backend):
    given = {
        "mamba_track_mask": torch.tensor([False, True]),
        "mamba_track_indices": torch.tensor([6, 7]),
    }
    backend.init_forward_metadata(batch(ForwardMode.DECODE, (1, 2), (1, 1), **given))
    pages = backend.pool.pages
    for layer_id in LAYERS:
        assert not pages[:, 7].any()
        backend.attend(layer(layer_id), *projections(2))
    assert torch.equal(pages[:, 7], pages[:, 2])
    assert pages[:, 7].any()
    assert not pages[:, 6].any()


def test_a_page_from_the_middle_of_a_prompt(backend, monkeypatch):
    """It is that of a prompt which ends there, and the whole prompt's outputs do not change."""
    from qwen3next_plugin.engines.sglang.state import snapshots

    monkeypatch.setattr(snapshots, "mamba_cache_chunk_size", lambda: 8)
    one, (qkvz, ba) = layer(0), projections(30)

    def prompt(n, mask, track):
        return batch(
            ForwardMode.EXTEND,
            (1, 3),
            (n, 10),
            extend_seq_lens_cpu=[n, 10],
            extend_prefix_lens_cpu=[0, 0],
            mamba_prefill_track_mask_cpu=mask,
            mamba_track_seqlens_cpu=track,
            mamba_track_indices=torch.tensor([6, 7]),
        )

    def run(n, mask, track):
        rows = torch.cat((torch.arange(n), torch.arange(20, 30)))
        backend.pool.pages.zero_()  # what a page does not span is left over from before
        backend.init_forward_metadata(prompt(n, mask, track))
        return backend.attend(one, qkvz[rows], ba[rows])

    run(16, [False, False], [-1, -1])
    until_16 = backend.pool.pages[0, 4].clone()
    followed = []
    for mask, track in (([False, False], [-1, -1]), ([True, False], [20, -1])):
        whole = run(20, mask, track)
        kept = backend.pool.pages[0].clone()
        backend.init_forward_metadata(batch(ForwardMode.DECODE, (1, 3), (21, 11)))
        followed.append((whole, backend.attend(one, qkvz[:2], ba[:2])))
    assert all(map(torch.equal, *followed))
    assert torch.equal(kept[6], until_16)
    assert not kept[7].any()


def test_tokens_behind_the_rows_are_zero(backend):
    """A prompt's graph is as long as its bucket."""
    given = {"extend_seq_lens_cpu": [3], "mamba_prefill_track_mask_cpu": None}
    backend.init_forward_metadata(batch(ForwardMode.EXTEND, (1,), (3,), **given))
    out = backend.attend(layer(0), *projections(8))
    assert not out[3:].any()
    assert (out[:3] != 0).all()


def test_a_prompts_graph_is_cut_at_the_layer(backend, monkeypatch):
    """Captured, nothing runs but a stand-in; replayed, the step of that moment."""
    from qwen3next_plugin.engines.sglang.state import device_steps

    calls = []
    monkeypatch.setattr(device_steps, "is_in_prefill_graph_scope", lambda: True)
    monkeypatch.setattr(device_steps, "is_in_breakable_cuda_graph", lambda: True)
    hybrid = SimpleNamespace(linear_attn_backend=backend)
    monkeypatch.setattr(device_steps, "get_attn_backend", lambda: calls.append(1) or hybrid)
    given = {"extend_seq_lens_cpu": [3], "mamba_prefill_track_mask_cpu": None}
    backend.init_forward_metadata(batch(ForwardMode.EXTEND, (1,), (3,), **given))
    inputs = projections(3)
    whole = backend.attend(layer_of := layer(0), *inputs)
    assert calls == [1]
    stub = torch.ones_like(whole)
    device_steps._write_zeros(layer_of, *inputs, stub)
    assert not stub.any()


def test_after_a_verification_pages_are_kept_where_a_point_was_passed(backend, monkeypatch):
    from sglang.srt.layers.attention import hybrid_linear_attn_backend

    from qwen3next_plugin.engines.sglang.state.device_steps import DeviceHybridBackend

    monkeypatch.setattr(hybrid_linear_attn_backend, "check_cuda_graph_backend", lambda *_: True)
    full = AttentionBackend()
    full.token_to_kv_pool = full.req_to_token_pool = None
    hybrid = DeviceHybridBackend(full, backend, [1])
    assert not hybrid.use_captured_forward_metadata_for_breakable_cuda_graph
    spec_info = SimpleNamespace(draft_token_num=3, tree_topk=1)
    hybrid.init_forward_metadata(
        batch(ForwardMode.TARGET_VERIFY, (2, 3), (0, 0), spec_info=spec_info)
    )
    for layer_id in LAYERS:
        backend.attend(layer(layer_id), *projections(6))
    hybrid.update_mamba_state_after_mtp_verify(
        torch.tensor([2, 0]), torch.tensor([6, 7]), torch.tensor([-1, 0]), None
    )
    pages = backend.pool.pages
    assert torch.equal(pages[:, 7], pages[:, 5])
    assert not pages[:, 6].any()
    hybrid.update_mamba_state_after_mtp_verify(torch.tensor([2, 0]), None, None, None)


@pytest.mark.parametrize("has_axes", [False, True])
def test_positions_of_images_are_for_models_that_have_them(has_axes):
    """SGLang's CUDA graphs of drafting bring some, which are zeros if the model has none."""
    from qwen3next_plugin.engines.sglang.model.mtp import Predictor

    class Head(Predictor):
        def __init__(self) -> None:
            self.has_axes = has_axes

        def embed_tokens(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

        def predict(self, positions: torch.Tensor, *_: object) -> torch.Tensor:
            return positions

    positions, of_images = torch.arange(4), torch.zeros(3, 4)
    spec_info = SimpleNamespace(hidden_states=None)
    for brought, used in ((of_images, of_images if has_axes else positions), (None, positions)):
        batch = SimpleNamespace(mrope_positions=brought, spec_info=spec_info)
        assert Head().forward(torch.arange(4), positions, batch) is used
