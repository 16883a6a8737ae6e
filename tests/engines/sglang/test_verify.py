"""SGLang's verification, through our hooks, samples from what its plain sampler samples from."""

from types import SimpleNamespace as Bag

import pytest
import torch

pytest.importorskip("sglang")

from engines.sglang.test_sampling import plain, some_limits
from engines.sglang.trees import chain, linked

V, D = 700, 3  # tokens; nodes of each request's chain


@pytest.fixture
def verify(monkeypatch):
    """Verify drafts [N, D] and return all that the sampling of a tree is given."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.layers import dp_attention
    from sglang.srt.speculative import eagle_utils

    flags = Bag(
        speculative_use_rejection_sampling=False,
        speculative_accept_threshold_single=1.0,
        speculative_accept_threshold_acc=1.0,
    )
    alone = Bag(tp_group=Bag(world_size=1))
    seen = {}

    def sample(**given):
        seen.update(given)
        given["accept_token_num"].zero_()

    monkeypatch.setattr(eagle_utils, "get_spec", lambda: flags)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: alone)
    monkeypatch.setattr(dp_attention, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(eagle_utils, "tree_speculative_sampling_target_only", sample)

    def run(logits, info, grammar_mask=None, drafts=None):
        N = len(logits) // D
        index, first, sibling = linked([chain(D)] * N)
        verify_input = Bag(
            draft_token_num=D,
            max_tree_depth=D,
            tree_topk=1,
            draft_token=torch.zeros(N * D).long() if drafts is None else drafts.flatten(),
            retrieve_index=index,
            retrieve_next_token=first,
            retrieve_next_sibling=sibling,
        )
        batch = Bag(
            device="cpu",
            forward_mode=Bag(is_idle=lambda: False),
            seq_lens=torch.full((N,), 9),
            sampling_info=info,
        )
        predict, *_ = eagle_utils.eagle_sample(
            verify_input, batch, Bag(next_token_logits=logits), grammar_mask
        )
        assert batch.sampling_info is info
        return seen | {"predict": predict.view(N, D)}

    return run


def sampling(N, top_ks=None, top_ps=None, min_ps=None, temperature=1.0, **options):
    """The host's own description of a batch's sampling parameters."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    return SamplingBatchInfo(
        temperatures=torch.full((N, 1), temperature),
        top_ks=torch.full((N,), 1 << 30).int() if top_ks is None else top_ks,
        top_ps=torch.ones(N) if top_ps is None else top_ps,
        min_ps=torch.zeros(N) if min_ps is None else min_ps,
        need_top_k_sampling=top_ks is not None,
        need_top_p_sampling=top_ps is not None,
        need_min_p_sampling=min_ps is not None,
        vocab_size=V,
        device="cpu",
        **({"is_all_greedy": False, "is_any_greedy": False} | options),
    )


@pytest.mark.parametrize("given", ["k", "p", "m", "kp", "km", "pm", "kpm", ""])
def test_distribution_is_that_of_plain_decoding(verify, given):
    torch.manual_seed(4)
    N, temperature = 9, 0.7
    chosen = dict(zip("kpm", some_limits(N), strict=True))
    names = {"k": "top_ks", "p": "top_ps", "m": "min_ps"}
    info = sampling(N, temperature=temperature, **{names[key]: chosen[key] for key in given})
    logits = 3 * torch.randn(N * D, V)
    probs = (logits / temperature).softmax(-1)
    got = verify(logits, info)["target_probs"]
    k, p, m = (x.repeat_interleave(D) for x in (info.top_ks, info.top_ps, info.min_ps))
    free = (k > V) & (p == 1) & (m == 0)  # beside others, the host rounds some of these away
    want = torch.where(free[:, None], probs, plain(probs, k, p, m))
    assert torch.equal(got.flatten(0, 1) > 0, want > 0)
    assert torch.allclose(got.flatten(0, 1), want, atol=1e-7, rtol=1e-5)


class Forbid:
    """A custom logit processor: the tokens from `custom_params` on are out."""

    def __call__(self, logits, custom_params):
        for row, params in zip(logits, custom_params, strict=True):
            row[params["first"] :] = float("-inf")
        return logits


def processed(N, rows, **options):
    from sglang.srt.sampling.sampling_batch_info import ProcessorEntry

    params = [{"first": 10 + i} for i in range(N)]
    entry = ProcessorEntry(processor=Forbid(), rows=rows, indices=torch.tensor(rows))
    return sampling(
        N,
        has_custom_logit_processor=True,
        custom_params=params,
        custom_logit_processor={1: entry},
        **options,
    )


class Mask:
    """A grammar's mask: token 0 is out."""

    def apply(self, logits):
        logits[:, 0] = float("-inf")


@pytest.mark.parametrize("masked", [False, True])
def test_custom_logit_processors_count_at_every_node(verify, masked):
    N, rows = 4, [1, 3]
    got = verify(torch.randn(N * D, V), processed(N, rows), Mask() if masked else None)
    allowed = got["target_probs"] > 0  # [N, D, V]
    for i in range(N):
        first = 10 + i if i in rows else V
        assert not allowed[i, :, first:].any()
        assert allowed[i, :, 1:first].all()
        assert allowed[i, :, 0].all() != masked


def test_custom_logit_processors_count_where_all_are_greedy(verify):
    logits = torch.arange(V).float().expand(2 * D, V).clone()
    info = processed(2, [0], is_all_greedy=True, is_any_greedy=True)
    drafts = torch.tensor([[0, 9, 9], [0, V - 1, V - 1]])
    predict = verify(logits, info, drafts=drafts)["predict"]
    assert predict.tolist() == [[9, 9, 9], [V - 1, V - 1, V - 1]]


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_without_any_token_gets_those_of_the_grammar(verify, masked):
    """As where min_new_tokens forbids the end, and a complete grammar allows nothing else."""
    logits = torch.randn(2 * D, V)
    logits[1, 1:] = float("-inf")
    logits[1, 0] = float("-inf") if not masked else 0
    allowed = verify(logits, sampling(2), Mask() if masked else None)["target_probs"] > 0
    assert allowed[:, :, 1:].all()
    assert allowed[:, :, 0].all() != masked
