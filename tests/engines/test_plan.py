"""What a model takes of memory, against published numbers and vLLM's own count."""

from dataclasses import replace
from math import ceil
from unittest.mock import MagicMock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sizes import CONFIGS as RELEASED_CONFIGS
from needs import need
from plans import CONFIG, COUNTS, SIZES, flags
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.memory import LEAST_POOLS
from qwen3next_plugin.engines.plan import GIB, make_plan
from qwen3next_plugin.engines.sglang.pools import Pools
from qwen3next_plugin.engines.vllm.blocks import Blocks
from qwen3next_plugin.kernels.paged_attention import SCRATCH
from qwen3next_plugin.model.checkpoint.sizes import (
    PARTS,
    part_of,
    rank_bytes,
)
from released import RELEASED_80B


def test_mapped_weights_that_take_all_leave_the_least():
    """As the engines size their pools."""
    spare = [make_plan(Pools, CONFIG, {}, flags(mapped=n * GIB)).spare for n in (0, 500)]
    assert spare[0] > spare[1] == LEAST_POOLS


def test_parameters_of_the_80b_are_the_published_ones():
    mtp = sum(n for name, n in COUNTS.items() if part_of(name) == "MTP")
    assert sum(COUNTS.values()) - mtp == pytest.approx(79.67e9, rel=1e-4)
    assert sum(COUNTS.values()) == pytest.approx(81.32e9, rel=1e-4)  # as the files hold them


def test_page_at_the_real_shapes():
    plan = make_plan(Blocks, CONFIG, SIZES, flags(num_speculative_tokens=3))
    window_token = 4 * (16 * 128 + 32 * 128 + 32)  # k, u, g in fp32
    assert plan.state_page["S"] == 2_097_152
    assert plan.state_page["window"] == (8 + 3) * window_token + 8 == 271_744 + 8
    assert plan.state_page["conv"] == (4 + 3) * 8192 * 2
    assert plan.block_tokens == 1280
    assert plan.state_bytes_per_slot == 36 * sum(plan.state_page.values())
    assert plan.kv_bytes_per_token == 13 * 2 * 2 * 256 * 2


def test_window_costs_no_larger_block():
    """A draft lengthens the window of a page, not its states: the block stays what it was."""
    blocks = {
        num_drafts: make_plan(
            Blocks, CONFIG, {}, flags(num_speculative_tokens=num_drafts)
        ).block_tokens
        for num_drafts in (0, 3, 6)
    }
    assert blocks == {0: 1280, 3: 1280, 6: 1280}


def test_groups_of_layers():
    plain = make_plan(Blocks, CONFIG, {}, flags(prefix_caching=False))
    assert (plain.state_blocks, plain.kv_blocks_each) == (3, 1)  # 36 and 12 layers, by twelves
    assert make_plan(Blocks, CONFIG, {}, flags()).state_blocks == 6
    drafting = make_plan(Blocks, CONFIG, {}, flags(num_speculative_tokens=1))
    assert drafting.block_bytes == 13 * 1280 * 2048  # 36 of 39 places used
    assert drafting.state_blocks == 6


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("length", [1, 1280, 1281, 262144])
@pytest.mark.parametrize("model", ["Qwen3-Next-80B-A3B", "Qwen3.5-2B", "Qwen3.6-27B"])
def test_blocks_are_the_ones_vllm_counts(model, length, drafts, prefix_caching):
    """The same layers as vLLM's own specs, grouped and counted by vLLM."""
    config = Qwen3NextConfig.from_hf(read_config(RELEASED_CONFIGS / model))
    need("vllm")
    import torch
    from vllm.v1 import kv_cache_interface as interface
    from vllm.v1.core import kv_cache_utils as utils

    asked = {"max_model_len": length, "prefix_caching": prefix_caching}
    plan = make_plan(Blocks, config, {}, flags(num_speculative_tokens=drafts, **asked))
    attention = interface.FullAttentionSpec(
        block_size=plan.block_tokens,
        num_kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        dtype=torch.bfloat16,
    )
    state = interface.MambaSpec(
        block_size=plan.block_tokens,
        shapes=((sum(plan.state_page.values()),),),
        dtypes=(torch.uint8,),
        page_size_padded=attention.page_size_bytes,
        mamba_cache_mode="align" if prefix_caching else "none",
    )
    kinds = config.layer_types + ("full_attention",) * bool(drafts)
    specs = {str(i): state if "linear" in kind else attention for i, kind in enumerate(kinds)}
    groups = utils._get_kv_cache_groups_uniform_page_size(specs)
    engine = MagicMock()
    engine.model_config.max_model_len = length
    engine.cache_config.mamba_cache_mode = state.mamba_cache_mode
    engine.parallel_config.decode_context_parallel_size = 1
    engine.parallel_config.prefill_context_parallel_size = 1
    spec_blocks = [
        ceil(g.kv_cache_spec.max_memory_usage_bytes(engine) / attention.page_size_bytes)
        for g in groups
    ]
    assert sum(spec_blocks) == plan.blocks_per_request
    group_size = max(len(g.layer_names) for g in groups)
    assert group_size * attention.page_size_bytes == plan.block_bytes


def test_no_drafts_no_drafter():
    plan = make_plan(Blocks, CONFIG, SIZES, flags())
    assert plan.weights["MTP"] == 0
    assert "draft head" not in plan.weights
    assert plan.kv_bytes_per_token == 12 * 2048


@pytest.mark.parametrize("tp_size", [1, 2, 4, 8, 16])
def test_ranks_hold_the_whole_model(tp_size):
    config = Qwen3NextConfig.from_hf(RELEASED_80B, tp_size=tp_size)
    whole, rank = rank_bytes(COUNTS, CONFIG), rank_bytes(COUNTS, config)
    for part in PARTS:  # more than a share: routers, norms and some KV heads are held by all
        assert whole[part] <= tp_size * rank[part] <= 2 * whole[part]
    page = make_plan(Blocks, config, {}, flags()).state_page
    assert tp_size * page["S"] == 2_097_152


@settings(deadline=None)
@given(memory=st.integers(0, 2000), more=st.integers(0, 500), length=st.integers(1, 262144))
def test_more_memory_never_serves_fewer(memory, more, length):
    def plan(gib):
        weights = {"model.embed_tokens.weight": 150 * GIB}
        return make_plan(Blocks, CONFIG, weights, flags(memory=gib * GIB, max_model_len=length))

    less, enough = plan(memory), plan(memory + more)
    assert 0 <= less.concurrency <= enough.concurrency <= 64
    used = less.concurrency * less.blocks_per_request * less.block_bytes
    assert less.concurrency == 0 or used + sum(less.weights.values()) < less.flags.memory


def test_pools_of_a_model_without_full_attention():
    config = replace(CONFIG, layer_types=("linear_attention",) * len(CONFIG.layer_types))
    plan = make_plan(Pools, config, SIZES, flags())
    assert plan.fits == plan.slots // 3 > 0


@pytest.mark.parametrize("engine", [Blocks, Pools])
@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("length", [1, 1280, 1281, 32768])
def test_a_requests_bytes_hold_it(engine, length, prefix_caching):
    """And not many more than it needs: what SGLang sets aside for states is a fixed share."""
    plan = make_plan(engine, CONFIG, {}, flags(max_model_len=length, prefix_caching=prefix_caching))
    at = {
        share: replace(plan, flags=replace(plan.flags, pools=int(share * plan.request_bytes)))
        for share in (1, 0.9)
    }
    assert at[1].fits >= 1
    assert at[0.9].fits <= 1


def test_scratch_is_counted_where_our_attention_serves(monkeypatch):
    plans = [make_plan(Pools, CONFIG, SIZES, flags(threads=n)) for n in (2, 64)]
    assert [plan.scratch for plan in plans] == [2 * SCRATCH, 64 * SCRATCH]
    assert plans[0].spare - plans[1].spare == 62 * SCRATCH
    assert make_plan(Blocks, CONFIG, SIZES, flags()).scratch == 0
    monkeypatch.setenv("QWEN3NEXT_BATCH_INVARIANT", "1")
    assert make_plan(Blocks, CONFIG, SIZES, flags()).scratch == 2 * SCRATCH
