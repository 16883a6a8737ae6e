"""Log-probabilities of tokens that a request chose, beside those of the likeliest."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.sample.sampler import Sampler

from qwen3next_plugin.extras.host_fixes.vllm.logprobs import gather_both

V = 61


@pytest.mark.parametrize("most", [2, 5, -1, None])
def test_chosen_tokens_beside_the_likeliest(most):
    """A row has what it asked for, whatever the others ask; `most`: that others ask for."""
    sampler, ids = Sampler(), {1: [7, 0, 9]}
    batch = SimpleNamespace(max_num_logprobs=most)
    gather = gather_both(SimpleNamespace(sampler=sampler, input_batch=batch))
    logprobs = torch.randn(3, V, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    sampled = torch.tensor([4, 5, 6])
    found = gather(logprobs, ids, sampled)
    chosen = found.logprob_token_ids[1, :4].tolist()
    assert chosen == [5, *ids[1]]
    assert torch.equal(found.logprobs[1, :4], logprobs[1, chosen])
    assert found.logprobs[1, 4:].isneginf().all()
    if most is not None:
        most = V if most == -1 else most
        alone = sampler.gather_logprobs(logprobs, most, token_ids=sampled)
        for row in (0, 2):
            assert torch.equal(found.logprobs[row, : most + 1], alone.logprobs[row])
            assert torch.equal(
                found.logprob_token_ids[row, : most + 1], alone.logprob_token_ids[row]
            )
        assert torch.equal(found.selected_token_ranks, alone.selected_token_ranks)


@pytest.mark.compat
def test_vllm_returns_the_chosen_tokens_alone():
    """Fails when it returns both: then `gather_both` can go."""
    source = inspect.getsource(Sampler.forward)
    assert "logprobs_tensors = logprob_token_ids_tensors" in source.partition("prefer")[2]
