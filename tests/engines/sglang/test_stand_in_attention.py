"""The stand-in's attention operators, as SGLang's CPU attention backend calls them."""

from importlib import import_module
from types import SimpleNamespace as Bag

import pytest
import torch

from engines.sglang.trees import Tree
from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide
from tolerances import assert_close

provide()
import_module("sgl_kernel")
HQ, HKV, D, SLOTS = 6, 2, 24, 61
DTYPES = (torch.float32, torch.bfloat16)


class Pool:
    """A KV pool of one layer, and which of its slots N requests use."""

    def __init__(self, seq_lens, dtype):
        self.keys, self.values = torch.randn(2, SLOTS, HKV, D).to(dtype)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int64)
        self.rows = torch.randperm(len(seq_lens) + 2)[: len(seq_lens)]
        slots = torch.randperm(SLOTS)
        self.table = torch.zeros(len(seq_lens) + 2, 20, dtype=torch.int32)[:, :17]
        for row, n in zip(self.rows, seq_lens, strict=True):
            self.table[row, :n], slots = slots[:n].int(), slots[n:]

    def slots(self, request: int) -> torch.Tensor:
        return self.table[self.rows[request], : self.seq_lens[request]].long()

    def attend(self, request: int, query: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """One query, [Hq, D], over the positions that it sees, in fp32."""
        keys, values = (
            cache[self.slots(request)[seen]].float().repeat_interleave(HQ // HKV, 1)
            for cache in (self.keys, self.values)
        )
        weights = torch.einsum("hd,shd->hs", query.float(), keys).mul(D**-0.5).softmax(-1)
        return torch.einsum("hs,shd->hd", weights, values)


def decode(pool, q, o, key, value, loc, **changed):
    """The call of the host's forward_decode."""
    given = {
        "k_scale": 1.0, "v_scale": 1.0, "logit_cap": 0.0, "is_cross_attn": False,
        "sliding_window_size": 0, "encoder_lens": None, "sinks": None,
    } | changed  # fmt: skip
    torch.ops.sgl_kernel.decode_attention_cpu(
        q, pool.keys, pool.values, given["k_scale"], given["v_scale"], o, key, value, loc,
        torch.zeros(len(q), HQ, 8, D + 1), pool.table, pool.rows, pool.seq_lens, D**-0.5,
        given["logit_cap"], given["is_cross_attn"], given["sliding_window_size"],
        given["encoder_lens"], given["sinks"],
    )  # fmt: skip


def extend(pool, q, o, lengths, tree_mask=None, window=0, **changed):
    """The call of the host's forward_extend."""
    lens = torch.tensor(lengths, dtype=torch.int32)
    torch.ops.sgl_kernel.extend_attention_cpu(
        q, None, None, o, pool.keys, pool.values, changed.get("k_scale", 1.0), 1.0, pool.table,
        pool.rows, pool.seq_lens, lens, (lens.cumsum(0) - lens).int(), max(lengths, default=0),
        D**-0.5, 0.0, False, window, None, changed.get("sinks"), tree_mask,
        changed.get("is_causal", True),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seq_lens", [[], [1], [7, 1, 16]], ids=str)
@pytest.mark.parametrize("saves", [True, False], ids=["writes", "written before"])
def test_decode(seq_lens, dtype, saves):
    pool, N = Pool(seq_lens, dtype), len(seq_lens)
    q, (key, value) = torch.randn(N, HQ, D).to(dtype), torch.randn(2, N, HKV, D).to(dtype)
    loc = torch.tensor([int(pool.slots(i)[-1]) for i in range(N)], dtype=torch.int64)
    keys, values = pool.keys.clone(), pool.values.clone()
    if saves:
        keys[loc], values[loc] = key, value
    o = torch.full((N + 2, HQ, D), -7.0, dtype=dtype)
    decode(pool, q, o[:N], *((key, value) if saves else (None, None)), loc)
    assert torch.equal(pool.keys, keys)
    assert torch.equal(pool.values, values)
    assert (o[N:] == -7).all()
    for i in range(N):
        want = pool.attend(i, q[i], torch.arange(seq_lens[i]))
        assert_close("paged_attention", dtype, o[i], want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("seq_lens", "lengths"), [([], []), ([1], [1]), ([9, 5, 17], [9, 2, 4])], ids=str
)
@pytest.mark.parametrize("padding", [0, 3])
def test_extend(seq_lens, lengths, dtype, padding):
    """Fresh prompts, chunks and chains of drafts in one batch; padding rows come out zero."""
    pool, T = Pool(seq_lens, dtype), sum(lengths)
    q = torch.randn(T + padding, HQ, D).to(dtype)
    o = torch.full((T + padding, HQ, D), float("nan"), dtype=dtype)
    extend(pool, q, o, lengths)
    at = 0
    for i, (n, new) in enumerate(zip(seq_lens, lengths, strict=True)):
        for position in range(n - new, n):
            want = pool.attend(i, q[at], torch.arange(position + 1))
            assert_close("paged_attention", dtype, o[at], want)
            at += 1
    assert not seq_lens or (o[T:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extend_by_a_tree(dtype):
    """Each draft sees the committed tokens, its ancestors and itself."""
    tree, seq_lens = Tree([-1, 0, 0, 1, 2]), [5, 11]
    pool, n = Pool(seq_lens, dtype), len(tree.parents)
    seen = torch.tensor([[j in (0, *tree.ancestors(i)) for j in range(n)] for i in range(n)])
    q = torch.randn(2 * n, HQ, D).to(dtype)
    o = torch.empty_like(q)
    extend(pool, q, o, [n, n], tree_mask=seen.flatten().repeat(2))
    for i, length in enumerate(seq_lens):
        for node in range(n):
            positions = torch.cat(
                [torch.arange(length - n), length - n + seen[node].nonzero().flatten()]
            )
            want = pool.attend(i, q[i * n + node], positions)
            assert_close("paged_attention", dtype, o[i * n + node], want)


REFUSED = {
    "attention sinks": {"sinks": torch.zeros(HQ)},
    "logit cap": {"logit_cap": 30.0},
    "cross attention": {"is_cross_attn": True},
    "cross attention,": {"encoder_lens": torch.ones(2), "sinks": torch.zeros(HQ)},
    "sliding window of 3 tokens": {"sliding_window_size": 3},
    "scaled KV cache": {"v_scale": 0.5},
}


@pytest.mark.parametrize("what", REFUSED)
def test_decode_refuses(what):
    pool = Pool([4, 2], torch.float32)
    o, keys = torch.full((2, HQ, D), -7.0), pool.keys.clone()
    new = torch.randn(2, HKV, D)
    with pytest.raises(NotImplementedError, match=rf"{what}.*torch_native"):
        decode(pool, torch.randn(2, HQ, D), o, new, new, torch.tensor([0, 1]), **REFUSED[what])
    assert (o == -7).all()
    assert torch.equal(pool.keys, keys)


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("attention sinks", {"sinks": torch.zeros(HQ)}),
        ("not causal", {"is_causal": False}),
        ("sliding window of 3 tokens", {"window": 3}),
        ("scaled KV cache", {"k_scale": 2.0}),
    ],
)
def test_extend_refuses(what, changed):
    pool = Pool([4], torch.float32)
    with pytest.raises(NotImplementedError, match=rf"{what}.*torch_native"):
        extend(pool, torch.randn(2, HQ, D), torch.empty(2, HQ, D), [2], **changed)


def test_a_window_wider_than_the_sequences_is_none():
    pool = Pool([4, 3], torch.float32)
    q, new = torch.randn(2, HQ, D), torch.randn(2, HKV, D)
    loc = torch.tensor([int(pool.slots(i)[-1]) for i in range(2)])
    plain, windowed = torch.empty_like(q), torch.empty_like(q)
    decode(pool, q, plain, new, new, loc)
    decode(pool, q, windowed, new, new, loc, sliding_window_size=4)
    assert torch.equal(plain, windowed)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("Qwen3NextForCausalLM", "AttentionBackend"),
        ("Qwen3NextForCausalLMMTP", "AttentionBackend"),
        ("Qwen3MoeForCausalLM", "IntelAMXAttnBackend"),
    ],
)
def test_other_models_keep_what_checks_their_options(monkeypatch, architecture, name):
    from sglang.srt.layers.attention.intel_amx_backend import IntelAMXAttnBackend

    from qwen3next_plugin.engines.sglang.cpu.attention_backend import make_backend

    monkeypatch.setattr(IntelAMXAttnBackend, "__init__", lambda self, runner: None)
    config = Bag(hf_config=Bag(architectures=[architecture]))
    assert type(make_backend(Bag(model_config=config))).__name__ == name
