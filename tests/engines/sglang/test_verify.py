"""SGLang's verification, through our patch, gives what its plain sampler gives step by step."""

import random
from array import array
from types import SimpleNamespace as Bag

import pytest
import torch

from engines.sglang.penalised import EOS, PARAMS, Batch, Request, alone, check, step
from engines.sglang.penalised import V as FEW
from engines.sglang.trees import Tree, chain, linked

V, D = 700, 4  # tokens; nodes of each request's draft
TREE = Tree([-1, 0, 0, 1])


@pytest.fixture
def host(monkeypatch):
    """SGLang's plain sampler, and its verification, in a process without a server."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt import runtime_context
    from sglang.srt.layers import sampler
    from sglang.srt.speculative import eagle_utils

    from qwen3next_plugin.engines.sglang.speculation import verify

    group = Bag(world_size=1, device_group=None)
    flags = Bag(
        deterministic=Bag(rl_on_policy_target=None, enable_deterministic_inference=True),
        kernel=Bag(sampling_backend="pytorch"),
        features=Bag(sampling_mask_max_tokens=0),
    )
    for module in (runtime_context, sampler):
        monkeypatch.setattr(module, "get_parallel", lambda: Bag(tp_group=group))
    monkeypatch.setattr(sampler, "get_exec", lambda: flags)
    monkeypatch.setattr(sampler, "is_dp_attention_enabled", lambda: False)
    monkeypatch.setattr(verify, "_sampler", sampler.Sampler)
    return Bag(Sampler=sampler.Sampler, eagle_sample=eagle_utils.eagle_sample)


def verified(host, tree, logits, info, drafts, seq_lens, grammar_mask=None, reqs=()):
    """(tokens of each request, the logits after it) of a verification of drafts [N, D]."""
    N = len(drafts)
    index, first, sibling = linked([tree] * N)
    depth = torch.tensor([len(tree.ancestors(node)) for node in range(D)])
    verify_input = Bag(
        draft_token_num=D,
        max_tree_depth=D,
        tree_topk=max(len(tree.children(node)) for node in range(D)),
        draft_token=drafts.flatten(),
        positions=(seq_lens[:, None] + depth).flatten(),
        retrieve_index=index,
        retrieve_next_token=first,
        retrieve_next_sibling=sibling,
    )
    batch = Bag(
        device="cpu",
        forward_mode=Bag(is_idle=lambda: False),
        seq_lens=seq_lens,
        sampling_info=info,
        reqs=reqs,
    )
    output = Bag(next_token_logits=logits.clone())
    predict, lens, index = host.eagle_sample(verify_input, batch, output, grammar_mask)
    assert batch.sampling_info is info
    kept = [predict[row[:n].long()].tolist() for row, n in zip(index, lens, strict=True)]
    return kept, output.next_token_logits


def sampling(N, **options):
    """The host's own description of a batch's sampling parameters; a seed for each request."""
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    defaults = {
        "temperatures": torch.full((N, 1), 0.7),
        "top_ks": torch.full((N,), 1 << 30).int(),
        "top_ps": torch.ones(N),
        "min_ps": torch.zeros(N),
        "sampling_seed": torch.arange(40, 40 + N),
        "is_all_greedy": False,
        "is_any_greedy": False,
        "need_top_k_sampling": "top_ks" in options,
        "need_top_p_sampling": "top_ps" in options,
        "need_min_p_sampling": False,
        "vocab_size": V,
        "device": "cpu",
    }
    return SamplingBatchInfo(**defaults | options)


def plain(host, logits, info, positions):
    """What a plain step samples from logits [N, V]."""
    logits = logits.clone()
    info.apply_logits_bias(logits)
    return host.Sampler()(Bag(next_token_logits=logits), info, False, [], [], positions)


PARAMETERS = {
    "temperature": lambda N: {},
    "greedy": lambda N: {"is_all_greedy": True, "is_any_greedy": True},
    "top_k and top_p": lambda N: {
        "top_ks": torch.randint(1, 20, (N,)).int(),
        "top_ps": torch.rand(N) / 2 + 0.4,
    },
    "logit_bias": lambda N: {"logit_bias": 9 * torch.randn(N, V)},
}


@pytest.mark.parametrize("case", PARAMETERS)
@pytest.mark.parametrize("tree", [chain(D), TREE], ids=["chain", "tree"])
def test_tokens_are_those_of_plain_steps_with_the_same_seed(host, tree, case):
    """Drafts are right up to some node, and wrong from there on."""
    torch.manual_seed(4)
    N = 9
    info, logits = sampling(N, **PARAMETERS[case](N)), 3 * torch.randn(N, D, V)
    seq_lens = torch.randint(5, 900, (N,))
    wanted, drafts = [[] for _ in range(N)], torch.full((N, D), V - 1)
    node, depth = torch.zeros(N, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    going_on = torch.ones(N, dtype=torch.bool)
    while going_on.any():
        token = plain(host, logits[torch.arange(N), node], info, seq_lens + depth)
        for i in going_on.nonzero().flatten().tolist():
            wanted[i].append(int(token[i]))
            children = tree.children(int(node[i]))
            if children and (i + int(depth[i])) % 4:  # draft what comes
                node[i] = children[-1]
                drafts[i, node[i]] = token[i]
            else:
                going_on[i] = False
        depth += 1
    found, _ = verified(host, tree, logits.flatten(0, 1), info, drafts, seq_lens)
    assert found == wanted
    assert len({len(tokens) for tokens in found}) > 1


def test_chains_of_different_lengths(host):
    """Each request's tokens are those that it gets alone."""
    torch.manual_seed(5)
    from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput

    lengths = [1, 4, 2, 3, 1]
    N, T = len(lengths), sum(lengths)
    bias, logits = 9 * torch.randn(N, V), 3 * torch.randn(T, V)
    drafts, seeds = torch.randint(0, V, (T,)).tolist(), torch.arange(40, 40 + N)
    starts = [sum(lengths[:i]) for i in range(N)]

    def verified(rows):
        """The tokens of requests `rows`."""
        among = torch.tensor([starts[i] + j for i in rows for j in range(lengths[i])])
        info = sampling(
            len(rows),
            logit_bias=bias[torch.tensor(rows)],
            sampling_seed=seeds[torch.tensor(rows)],
            temperatures=torch.full((len(rows), 1), 0.7),
        )
        chains = RaggedVerifyInput.of(
            [drafts[starts[i] :][: lengths[i]] for i in rows],
            widths=[lengths[i] for i in rows],
            positions=torch.tensor([9 + i + j for i in rows for j in range(lengths[i])]),
            locations=torch.zeros(len(among), dtype=torch.int64),
            axes=[None] * len(rows),
        )
        batch = Bag(forward_mode=Bag(is_idle=lambda: False), sampling_info=info)
        output = Bag(next_token_logits=logits[among].clone())
        predict, lens, index = host.eagle_sample(chains, batch, output)
        return [predict[row[:n].long()].tolist() for row, n in zip(index, lens, strict=True)]

    for i in range(N):  # drafts that are right, up to some point
        for j in range(1, lengths[i] - i % 2):
            drafts[starts[i] + j] = verified([i])[0][j - 1]
    found = verified(range(N))
    assert found == [verified([i])[0] for i in range(N)]
    assert [len(tokens) for tokens in found] == [1, 3, 2, 2, 1]


@pytest.mark.parametrize("tree", [chain(D), TREE], ids=["chain", "tree"])
def test_penalties_count_the_drafts_before_a_node(host, tree):
    """Bit for bit those of plain steps, of which the host's penalizers see each token."""
    rng, N = random.Random(6), len(PARAMS)
    batch = Batch([Request(**params) for params in PARAMS])
    for _ in range(3):
        step(batch, rng, 3)
        batch.count()
    drafts = torch.tensor([[rng.randrange(FEW) for _ in range(D)] for _ in PARAMS])
    options = {"is_all_greedy": True, "is_any_greedy": True, "vocab_size": FEW}
    info = sampling(N, penalizer_orchestrator=batch.penalizers, **options).copy_for_forward()
    logits, seq_lens = torch.randn(N * D, FEW), torch.full((N,), 9)
    with torch.compiler.set_stance("force_eager"):
        found = verified(host, tree, logits, info, drafts, seq_lens, reqs=batch.reqs)[1]
        for i, request in enumerate(batch.reqs):
            for node in range(D):
                path = sorted(tree.ancestors(node))
                row = logits[i * D + node].clone()[None]
                alone(request, drafts[i, path].tolist()).penalizers.apply(row)
                assert torch.equal(found[i * D + node], row[0]), (i, node)
        check(batch)  # the drafts are not counted for good


class Forbid:
    """A custom logit processor: the tokens from `custom_params` on are out."""

    def __call__(self, logits, custom_params):
        for row, params in zip(logits, custom_params, strict=True):
            row[params["first"] :] = float("-inf")
        return logits


class Recall:
    """Another: the token that follows from all of an answer's tokens, by their order too."""

    def __call__(self, logits, custom_params):
        for row, params in zip(logits, custom_params, strict=True):
            row[:] = float("-inf")
            row[self.after(params["__req__"].output_ids)] = 0
        return logits

    @staticmethod
    def after(tokens):
        return sum(place * token for place, token in enumerate(tokens, 1)) % V


def processed(N, rows, processor=None, params=None, **options):
    from sglang.srt.sampling.sampling_batch_info import ProcessorEntry

    params = params or [{"first": 10 + i} for i in range(N)]
    entry = ProcessorEntry(processor=processor or Forbid(), rows=rows, indices=torch.tensor(rows))
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
def test_custom_logit_processors_count_at_every_node(host, masked):
    N, rows = 4, [1, 3]
    mask, drafts = Mask() if masked else None, torch.zeros(N, D).long()
    given = torch.randn(N * D, V), processed(N, rows), drafts, torch.full((N,), 9)
    allowed = verified(host, chain(D), *given, mask)[1].view(N, D, V) > float("-inf")
    for i in range(N):
        first = 10 + i if i in rows else V
        assert not allowed[i, :, first:].any()
        assert allowed[i, :, 1:first].all()
        assert allowed[i, :, 0].all() != masked


def test_custom_logit_processors_count_where_all_are_greedy(host):
    logits = torch.arange(V).float().expand(2 * D, V)
    info = processed(2, [0], is_all_greedy=True, is_any_greedy=True)
    drafts = torch.tensor([[0, 9, 9, 9], [0, V - 1, V - 1, V - 1]])
    found, _ = verified(host, chain(D), logits, info, drafts, torch.full((2,), 9))
    assert found == [[9] * D, [V - 1] * D]


@pytest.mark.parametrize("tree", [chain(D), TREE], ids=["chain", "tree"])
def test_custom_logit_processors_see_the_drafts_before_a_node(host, tree):
    answers = [array("q", [5, 6, 7]), array("q", [8])]
    params = [{"__req__": Bag(output_ids=answer)} for answer in answers]
    info = processed(2, [0, 1], Recall(), params, is_all_greedy=True, is_any_greedy=True)
    drafts = torch.randint(0, V, (2, D), generator=torch.Generator().manual_seed(1))
    given = torch.randn(2 * D, V), info, drafts, torch.full((2,), 9)
    found = verified(host, tree, *given)[1].argmax(1).view(2, D)
    for i, answer in enumerate(answers):
        for node in range(D):
            path = sorted(tree.ancestors(node))
            expected = Recall.after([*answer, *drafts[i, path].tolist()])
            assert found[i, node] == expected, (i, node)
    assert [list(answer) for answer in answers] == [[5, 6, 7], [8]]


class End:
    """A complete grammar's mask: all tokens but the last are out."""

    def apply(self, logits):
        logits[:, :-1] = float("-inf")


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_without_any_token_gets_those_of_the_grammar(host, masked):
    """As where a custom logit processor forbids all that the grammar allows."""
    mask, drafts = Mask() if masked else None, torch.zeros(2, D).long()
    info = processed(2, [0], params=[{"first": 1 if masked else 0}, {}])
    given = torch.randn(2 * D, V), info, drafts, torch.full((2,), 9)
    allowed = verified(host, chain(D), *given, mask)[1] > float("-inf")
    assert allowed[:, 1:].all()
    assert allowed[:, 0].all() != masked


@pytest.mark.parametrize("masked", [False, True])
def test_least_tokens_leave_one(host, masked):
    """If all tokens end the answer, any; if a grammar allows the end alone, the end."""
    request = Request(min_new_tokens=5, stop_token_ids=None if masked else {*range(FEW)})
    batch, mask = Batch([request]), End() if masked else None
    options = {"top_ps": torch.tensor([0.9]), "sampling_seed": None, "vocab_size": FEW}
    info = sampling(1, penalizer_orchestrator=batch.penalizers, **options)
    info.grammar_mask = mask
    logits, seq_lens, drafts = torch.randn(D, FEW), torch.tensor([9]), torch.zeros(1, D).long()
    given = logits, info.copy_for_forward(), drafts, seq_lens, mask, [request]
    (token,) = plain(host, logits[:1], info, seq_lens).tolist()
    for one in (token, verified(host, chain(D), *given)[0][0][0]):
        assert one == EOS if masked else 0 <= one < FEW
