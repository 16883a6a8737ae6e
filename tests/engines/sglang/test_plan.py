"""`qwen3next plan --engine sglang` against SGLang's own sizing of its pools."""

from types import SimpleNamespace as Bag

import pytest

from benchmarks.sizes import CONFIGS
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.engines.plan import GIB, Flags, make_plan
from qwen3next_plugin.engines.sglang.pools import ALIGNMENT, Pools


@pytest.mark.parametrize("model", ["Qwen3-Next-80B-A3B", "Qwen3.5-0.8B", "Qwen3.6-27B"])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("cached", [True, False], ids=["radix", "no-radix"])
def test_pools_are_the_ones_sglang_makes(monkeypatch, model, drafts, cached):
    # Imported here: SGLang's list of quantisations is made for the device known by then.
    from sglang.srt.mem_cache import kv_cache_configurator as host

    from qwen3next_plugin.engines.sglang.state import pages

    config = Qwen3NextConfig.from_hf(read_config(CONFIGS / model))
    flags = Flags(
        max_model_len=32768,
        max_num_seqs=24,
        num_speculative_tokens=drafts,
        dtype="bfloat16",
        state_dtype="float32",
        prefix_caching=cached,
        memory=96 * GIB,
        threads=16,
    )
    plan = make_plan(Pools, config, {}, flags)
    assert pages.ALIGNMENT == ALIGNMENT
    schedule = Bag(
        max_mamba_cache_size=None,
        max_running_requests=flags.max_num_seqs,
        mamba_full_memory_ratio=0.9,
    )
    mamba = Bag(enable_linear_replayssm_spec=False, enable_mamba_extra_buffer=False)
    for name, value in (
        ("get_schedule", schedule),
        ("get_memory", Bag(disable_radix_cache=not cached)),
        ("get_exec", Bag(mamba=mamba)),
        ("get_spec", Bag(speculative_num_draft_tokens=drafts + 1)),
        ("get_context", Bag(override=lambda _, **new: vars(schedule).update(new))),
    ):
        monkeypatch.setattr(host, name, lambda value=value: value)
    monkeypatch.setattr(host, "_pd_prefill_skips_mamba_spec_state", lambda: True)  # our patch
    layers = list(range(config.num_linear_layers))
    params = Bag(layers=layers, mamba_cache_per_req=plan.slot_bytes)
    configurator = Bag(
        mambaish_config=Bag(mamba2_cache_params=params),
        pp_size=1,
        attn_dp_size=1,
        extra_mamba_cache_bytes_per_req=0,
        hybrid_gdn_config=object(),
        hybrid_kda_config=None,
        fused_entry_bytes=lambda _: None,
        spec_algorithm=Bag(is_none=lambda: not drafts),
        # Not ours: SGLang's own function, also where a test before has applied our patches.
        model_config=Bag(context_len=flags.max_model_len, hf_config=Bag(architectures=[])),
    )
    configurator._calculate_mamba_ratio = lambda: host.KVCacheConfigurator._calculate_mamba_ratio(
        configurator
    )
    left = host.KVCacheConfigurator._handle_max_mamba_cache(configurator, plan.spare / GIB)
    tokens = int(left * GIB) // plan.kv_bytes_per_token
    running = host.KVCacheConfigurator.resolve_max_num_reqs(configurator, tokens)
    assert schedule.max_mamba_cache_size == plan.slots
    assert abs(tokens - plan.tokens) <= 1  # SGLang counts in GiB
    assert min(running, tokens // flags.max_model_len) == plan.concurrency
