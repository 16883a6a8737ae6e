"""The backend that builds steps: what a CUDA graph may keep, and drafts that the device trims."""

from types import SimpleNamespace

import torch

from qwen3next_plugin.engines.vllm.state import steps as backend


def test_any_step_may_be_captured_on_a_gpu(monkeypatch):
    support = backend.StepBuilder.get_cudagraph_support
    assert support(None, None) == backend.AttentionCGSupport.NEVER
    monkeypatch.setattr(type(backend.current_platform), "is_cpu", lambda self: False)
    assert support(None, None) == backend.AttentionCGSupport.ALWAYS


def test_adaptive_verification_is_not_refused(monkeypatch):
    """vLLM's own check of the backends of a model with our linear layers, on a GPU."""
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as host

    monkeypatch.setattr(type(backend.current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(host, "AdaptiveVerificationManager", lambda *args, **kwargs: args)
    group = SimpleNamespace(
        backend=backend.GatedDeltaNetBackend,
        layer_names=["layers.0"],
        kv_cache_spec=None,
        get_metadata_builder=lambda _: backend.StepBuilder,
    )
    assert host.maybe_create_adaptive_verification_manager(
        enable_adaptive_verification=True,
        attn_groups=[[group]],
        req_states=SimpleNamespace(num_speculative_steps=3),
        query_start_loc=None,
        num_bonus_tokens=1,
        max_total_logits=64,
        vllm_config=None,
    )


def test_a_step_has_the_lengths_of_the_device(monkeypatch):
    """Of 3 rows with 3 drafts each, 4 of 9 drafts stay; the host spreads them evenly."""
    monkeypatch.setattr(backend, "mamba_get_block_table_tensor", lambda table, *_: table)
    builder = backend.StepBuilder.__new__(backend.StepBuilder)
    builder.on_device = backend.DeviceSteps(4, torch.device("cpu"))
    builder.kv_cache_spec = builder.cache_config = SimpleNamespace(mamba_cache_mode="none")
    on_device = torch.tensor([0, 4, 5, 7, 7], dtype=torch.int32)  # the last row is padding
    common = SimpleNamespace(
        query_start_loc=on_device,
        query_start_loc_cpu=torch.tensor([0, 3, 5, 7, 7], dtype=torch.int32),
        seq_lens=torch.tensor([24, 9, 102, 0], dtype=torch.int32),
        block_table_tensor=torch.tensor([[5], [9], [2], [0]], dtype=torch.int32),
        num_actual_tokens=7,
        max_query_len=4,
    )
    step = builder.build(0, common)
    assert step.query_start_loc.tolist() == on_device.tolist()
    assert step.context_len.tolist()[:3] == [20, 8, 100]
    assert step.slot.tolist() == [5, 9, 2, -1]
    assert (step.num_tokens, step.max_query_len) == (7, 4)
