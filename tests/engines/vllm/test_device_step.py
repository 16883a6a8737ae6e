"""Steps on a GPU: what their tensors say, and that a CUDA graph may keep them."""

from types import SimpleNamespace

import pytest
import torch

from qwen3next_plugin.model.step import NULL_SLOT

backend = pytest.importorskip("qwen3next_plugin.engines.vllm.backend")
CPU = torch.device("cpu")


def metadata(starts, seq_lens) -> SimpleNamespace:
    """vLLM's metadata of a step, as far as it is read."""
    query_start_loc = torch.tensor(starts, dtype=torch.int32)
    return SimpleNamespace(
        query_start_loc=query_start_loc,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        num_actual_tokens=starts[-1],
        max_query_len=int(query_start_loc.diff().max()),
    )


def test_rows_and_padding():
    """A prefill, a verified draft, a decode; then rows that a graph's batch is filled up with."""
    step = backend.DeviceStep(8, CPU).build(
        metadata((0, 70, 73, 74, 74, 74), (70, 12, 31, 0, 9)), torch.tensor([3, 5, 1, 0, 4])
    )
    assert step.query_start_loc.tolist() == [0, 70, 73, 74, 74, 74]
    assert step.context_len.tolist()[:3] == [0, 9, 30]
    assert step.slot.tolist() == [3, 5, 1, NULL_SLOT, NULL_SLOT]
    assert (step.num_tokens, step.max_query_len) == (74, 70)
    assert {t.dtype for t in (step.query_start_loc, step.slot, step.context_len)} == {torch.int32}


def test_rows_of_a_dummy_run_own_no_page():
    """vLLM captures graphs with all rows on its null block."""
    step = backend.DeviceStep(4, CPU).build(
        metadata((0, 2, 4), (50, 50)), torch.zeros(2, dtype=torch.int32)
    )
    assert step.slot.tolist() == [NULL_SLOT] * 2


def test_the_same_tensors_in_every_step():
    steps = backend.DeviceStep(4, CPU)
    first = steps.build(metadata((0, 1, 2), (5, 6)), torch.tensor([2, 3]))
    addresses = [t.data_ptr() for t in (first.query_start_loc, first.slot, first.context_len)]
    second = steps.build(metadata((0, 1, 2), (6, 7)), torch.tensor([2, 3]))
    assert first.context_len.tolist() == second.context_len.tolist() == [5, 6]
    assert addresses == [
        t.data_ptr() for t in (second.query_start_loc, second.slot, second.context_len)
    ]


def test_any_step_may_be_captured(monkeypatch):
    support = backend.StepBuilder.get_cudagraph_support
    assert support(None, None) == backend.AttentionCGSupport.NEVER
    monkeypatch.setattr(type(backend.current_platform), "is_cpu", lambda self: False)
    assert support(None, None) == backend.AttentionCGSupport.ALWAYS
