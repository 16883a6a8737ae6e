"""The backend that builds steps: which of them a CUDA graph may keep."""

import pytest

backend = pytest.importorskip("qwen3next_plugin.engines.vllm.state.steps")


def test_any_step_may_be_captured_on_a_gpu(monkeypatch):
    support = backend.StepBuilder.get_cudagraph_support
    assert support(None, None) == backend.AttentionCGSupport.NEVER
    monkeypatch.setattr(type(backend.current_platform), "is_cpu", lambda self: False)
    assert support(None, None) == backend.AttentionCGSupport.ALWAYS
