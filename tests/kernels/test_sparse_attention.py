"""Sparse attention: which blocks transformers selects, and attention over them."""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from test_paged_attention import BLOCK, HEADS, Pool, exactly, int32
from torch import Tensor
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextQSAIndexer

from qwen3next_plugin.kernels.index_keys import index_keys
from qwen3next_plugin.kernels.paged_attention import Selection, paged_attention
from qwen3next_plugin.kernels.paged_attention.selection import selected
from qwen3next_plugin.kernels.select_blocks import select_blocks
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE, EPS, LENGTH = 4, 1e-6, 700  # positions of a block; lines of cos_sin
NOWHERE = 2**31 - 1


class Indexer:
    """transformers' indexer with random weights, and the caches of its sequences."""

    def __init__(self, lengths, *, P=1, heads=3, d=40, rotary=12, top_k=5, dtype=torch.float32):
        config = SimpleNamespace(
            hidden_size=24, indexer_n_heads=heads, indexer_kv_heads=1, indexer_head_dim=d,
            indexer_budget=top_k * SIZE, indexer_compress_ratio=SIZE, rms_norm_eps=EPS,
        )  # fmt: skip
        self.module = Qwen4ExpTextQSAIndexer(config, 0).requires_grad_(False)
        for name in ("q_layernorm", "k_layernorm"):
            getattr(self.module, name).weight.normal_()
        self.weights = {
            f"{name}_weight": getattr(self.module, f"{name}_layernorm").weight.to(dtype)
            for name in "qk"
        }
        angles = torch.rand(LENGTH, rotary // 2) * 6
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
        self.hidden = [torch.randn(n, 24) for n in lengths]
        self.qk = [self.module.index_qk_proj(x).to(dtype) for x in self.hidden]
        self.P, self.top_k, self.d, self.dtype = P, top_k, d, dtype
        pages = [-(-n // P) for n in lengths]
        self.table = torch.full((len(lengths) + 1, max(pages) + 1), NOWHERE, dtype=torch.int32)
        slots = torch.randperm(sum(pages) + 3)[: sum(pages)].split(pages)
        for line, part in zip(self.table[1:], slots, strict=True):
            line[: len(part)] = part
        of_page = (sum(pages) + 3,) if P == 1 else (sum(pages) + 3, P)
        blocks = of_page if P == 1 else (of_page[0], P // SIZE)
        self.key_cache = torch.full((*of_page, d), torch.nan, dtype=dtype)
        self.block_cache = torch.full((*blocks, d), torch.nan, dtype=dtype)

    def sequences(self, steps) -> dict[str, Tensor]:
        """steps: (sequence, its first token of the step, its end)."""
        ends = torch.tensor([end - begin for _, begin, end in steps]).cumsum(0).tolist()
        return {
            "token_table": self.table,
            "table_row": int32(*(i + 1 for i, _, _ in steps)),
            "query_start_loc": int32(0, *ends),
            "seq_lens": int32(*(end for _, _, end in steps)),
        }

    def index(self, *steps, qk: Tensor | None = None) -> Tensor:
        """The queries of the step; stores its keys."""
        positions = torch.cat([torch.arange(begin, end) for _, begin, end in steps])
        given = torch.cat([self.qk[i][begin:end] for i, begin, end in steps])
        return index_keys(
            qk=given if qk is None else qk, **self.weights, cos_sin=self.cos_sin,
            positions=positions, block_positions=positions // SIZE * SIZE,
            key_cache_=self.key_cache, block_cache_=self.block_cache, **self.sequences(steps),
            block_size=SIZE, eps=EPS,
        )  # fmt: skip

    def choose(self, q: Tensor, *steps) -> Selection:
        return select_blocks(
            q=q, block_cache=self.block_cache, **self.sequences(steps), block_size=SIZE,
            top_k=self.top_k,
        )  # fmt: skip

    def __call__(self, *steps) -> Selection:
        return self.choose(self.index(*steps), *steps)

    def theirs(self, i: int) -> Tensor:
        """What each token of sequence i sees. Shapes: returns [S, S]"""
        S = len(self.hidden[i])
        cos, sin = (half.repeat(1, 2)[None] for half in self.cos_sin[:S].chunk(2, -1))
        causal = torch.ones(1, 1, S, S, dtype=torch.bool).tril()
        return self.module(self.hidden[i][None], (cos, sin), causal, None)[0, 0] & causal[0, 0]


def seen(selection: Selection, begin: int, first: int, end: int) -> Tensor:
    """What tokens [first, end) of a sequence see of it; `begin`: where they are in the step."""
    causal = torch.ones(end - first, end, dtype=torch.bool).tril(first)
    return selected(causal, selection, begin)


@pytest.mark.parametrize("P", [1, 4, 16])
@pytest.mark.parametrize("heads", [3, 6])  # of one head many scores are zero: equals
def test_selection_of_the_model(cpu_backend, heads, P):
    """Two prompts in one step, shorter and longer than what is selected."""
    indexer = Indexer((61, 17), P=P, heads=heads)
    selection = indexer((0, 0, 61), (1, 0, 17))
    assert selection.blocks.shape == (78, 5)
    assert torch.equal(seen(selection, 0, 0, 61), indexer.theirs(0))
    assert torch.equal(seen(selection, 61, 0, 17), indexer.theirs(1))
    assert (selection.tail[:23] == 0).all()  # everything, up to five blocks and a part


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("P", [1, 8])
def test_same_bits_in_any_chunks(bits_level, dtype, P):
    """Also when wrong tokens were drafted and rejected."""
    S = 90
    whole = Indexer((S, 40), P=P, dtype=dtype)
    q = whole.index((0, 0, S))
    blocks, tail, _ = whole.choose(q, (0, 0, S))
    for size in (1, 2, 3, 7, 30):
        parts = Indexer((S, 40), P=P, dtype=dtype)
        parts.weights, parts.cos_sin, parts.table = whole.weights, whole.cos_sin, whole.table
        parts.qk, wrong = whole.qk, torch.randn_like(whole.qk[0])
        for begin in range(0, S, size):
            end = min(begin + size, S)
            drafted = min(end + 5, S)
            parts.index((0, begin, drafted), qk=wrong[begin:drafted])
            steps = ((0, begin, end), (1, 0, 9))
            part = parts.index(*steps)
            assert torch.equal(part[: end - begin], q[begin:end])
            chosen = parts.choose(part, *steps)
            assert torch.equal(chosen.blocks[: end - begin], blocks[begin:end])
            assert torch.equal(chosen.tail[: end - begin], tail[begin:end])
        for b in range(S // SIZE):
            page, first = divmod(b * SIZE, P)
            at = (
                (int(whole.table[1, (b + 1) * SIZE - 1]),)
                if P == 1
                else (int(whole.table[1, page]), first // SIZE)
            )
            assert torch.equal(parts.block_cache[at], whole.block_cache[at])


@pytest.mark.parametrize("P", [1, 4])
def test_lower_block_of_equals(cpu_backend, P):
    indexer, S = Indexer((50,), P=P), 50
    q = torch.zeros_like(indexer.index((0, 0, S)))
    blocks, tail, _ = indexer.choose(q, (0, 0, S))
    assert blocks[-1].tolist() == [0, 1, 2, 3, 4]
    assert tail[-1] == 48


def test_many_blocks(cpu_backend):
    """More than one task, and more scores than are computed at once."""
    indexer = Indexer((LENGTH,), top_k=40, d=16, rotary=8)
    S = LENGTH
    indexer.index((0, 0, S))
    q = torch.randn(60, 3, 16)
    blocks, tail, _ = indexer.choose(q, (0, S - 60, S))
    lines = indexer.table[1, SIZE - 1 : S : SIZE].long()
    scores = torch.einsum("qhd,bd->qhb", q, indexer.block_cache[lines]).relu().sum(1)
    for j in range(60):
        complete = (S - 60 + j + 1) // SIZE
        assert tail[j] == complete * SIZE
        assert blocks[j].tolist() == scores[j, :complete].topk(40).indices.sort().values.tolist()


def test_tokens_of_no_row(cpu_backend):
    indexer = Indexer((30,))
    steps, given = ((0, 0, 30),), torch.cat([indexer.qk[0], torch.ones(2, 4 * 40)])
    arguments = indexer.sequences(steps)
    positions = torch.arange(32)
    q = index_keys(
        qk=given, **indexer.weights, cos_sin=indexer.cos_sin, positions=positions,
        block_positions=positions, key_cache_=indexer.key_cache,
        block_cache_=indexer.block_cache, **arguments, block_size=SIZE, eps=EPS,
    )  # fmt: skip
    assert (q[30:] == 0).all()
    selection = select_blocks(
        q=q, block_cache=indexer.block_cache, **arguments, block_size=SIZE, top_k=5
    )
    assert (selection.blocks[30:] == -1).all()
    assert (selection.tail[30:] == 0).all()


def random_selection(steps, top_k: int) -> Selection:
    """For queries of (sequence, first token, end): some of the complete blocks."""
    positions = [p for _, begin, end in steps for p in range(begin, end)]
    blocks = torch.full((len(positions), top_k + 2), -1, dtype=torch.int32)[:, :top_k]
    tail = torch.zeros(len(positions), dtype=torch.int32)
    for t, p in enumerate(positions):
        complete = (p + 1) // SIZE
        if complete > top_k:
            blocks[t] = torch.randperm(complete)[:top_k].sort().values
            tail[t] = complete * SIZE
    return Selection(blocks, tail, SIZE)


@cache  # the equation takes longer than all backends
def batch_of_all_kinds(heads, dtype) -> tuple[dict, torch.Tensor]:
    """Arguments, and what the equation makes of them."""
    pool = Pool.random((BLOCK + 1, 600, 900, 1, 290), heads, dtype)
    steps = ((0, BLOCK, BLOCK + 1), (1, 570, 600), (2, 896, 900), (3, 0, 1), (4, 0, 290))
    arguments = pool.arguments(*steps) | {"selection": random_selection(steps, 70)}
    return arguments, exactly(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_attention_against_the_equation(cpu_backend, heads, dtype):
    """Decode, verify, a chunk and a prompt that begins with everything in one batch."""
    arguments, expected = batch_of_all_kinds(heads, dtype)
    assert_close("paged_attention", dtype, paged_attention(**arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_everything_selected_has_the_bits_of_full_attention(bits_level, dtype):
    pool = Pool.random((700, 40), HEADS[0], dtype)
    steps = ((0, 640, 700), (1, 39, 40))
    arguments = pool.arguments(*steps)
    blocks = torch.arange(175, dtype=torch.int32).expand(61, 175).clone()
    tail = torch.zeros(61, dtype=torch.int32)
    positions = [*range(640, 700), 39]
    for t, p in enumerate(positions):
        tail[t] = (p + 1) // SIZE * SIZE
        blocks[t, (p + 1) // SIZE :] = -1
    full = paged_attention(**arguments)
    assert torch.equal(paged_attention(**arguments, selection=Selection(blocks, tail, SIZE)), full)
    nothing = Selection(torch.full_like(blocks, -1), torch.zeros_like(tail), SIZE)
    assert torch.equal(paged_attention(**arguments, selection=nothing), full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [HEADS[0], HEADS[3]], ids=str)
def test_same_bits_of_attention_in_any_chunks(bits_level, heads, dtype):
    pool = Pool.random((2 * BLOCK + 41, 300), heads, dtype)
    S = len(pool.q[0])
    selection = random_selection(((0, 0, S),), 80)
    whole = paged_attention(**pool.arguments((0, 0, S)), selection=selection)
    for size in (1, 3, 100, BLOCK):
        for begin in range(S % size, S, size) if size > 8 else range(S - 12, S, size):
            end = min(begin + size, S)
            steps = ((0, begin, end), (1, 299, 300))
            other = random_selection(((1, 299, 300),), 80)
            part = Selection(
                torch.cat([selection.blocks[begin:end], other.blocks]),
                torch.cat([selection.tail[begin:end], other.tail]),
                SIZE,
            )
            out = paged_attention(**pool.arguments(*steps), selection=part)
            assert torch.equal(out[:-1], whole[begin:end]), (begin, end)


@pytest.mark.parametrize("P", [7, 32])
def test_attention_in_pages(cpu_backend, P):
    pool = Pool.random((BLOCK + 1, 600), HEADS[3], torch.bfloat16)
    steps = ((0, BLOCK, BLOCK + 1), (1, 570, 600))
    arguments = pool.arguments(*steps) | {"selection": random_selection(steps, 50)}
    expected = paged_attention(**arguments)
    assert torch.equal(paged_attention(**arguments | pool.paged(P)), expected)


@pytest.mark.parametrize(
    ("blocks", "tail", "complaint"),
    [
        ([2, 2, -1], 40, "token 0: at position 45 it cannot see 1 blocks before position 12"),
        ([3, 2, -1], 40, "token 0: at position 45 it cannot see 1 blocks before position 16"),
        ([0, 1, 10], 40, "token 0: .* 3 blocks before position 44 and all from 40 on"),
        ([0, -1, 5], 47, "token 0: .* 1 blocks before position 4 and all from 47 on"),
        ([-1, -1, -1], -1, "token 0: .* 0 blocks before position 0 and all from -1 on"),
        ([NOWHERE, -1, -1], 40, "token 0: .* 1 blocks before"),
    ],
)
def test_refuses_what_cannot_be_selected(cpu_backend, blocks, tail, complaint):
    pool = Pool.random((46,), HEADS[1], torch.float32)
    selection = Selection(int32(*blocks)[None], int32(tail), SIZE)
    with pytest.raises(RuntimeError, match=complaint):
        paged_attention(**pool.arguments((0, 45, 46)), selection=selection)


def test_refuses_blocks_of_too_many_positions(cpu_backend):
    """The end of the second block is more than 64 bits hold."""
    pool = Pool.random((46,), HEADS[1], torch.float32)
    selection = Selection(int32(1, -1, -1)[None], int32(40), 2**62)
    with pytest.raises(RuntimeError, match=r"token 0: .* 1 blocks before position"):
        paged_attention(**pool.arguments((0, 45, 46)), selection=selection)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"blocks": torch.zeros(1, 3)}, "blocks is torch.float32"),
        ({"blocks": torch.zeros(2, 3, dtype=torch.int32)}, "blocks has shape"),
        ({"tail": int32(0, 0)}, "tail has shape"),
        ({"block_size": 0}, "of 0 positions"),
    ],
)
def test_refuses_selections(cpu_backend, change, complaint):
    pool = Pool.random((46,), HEADS[1], torch.float32)
    selection = Selection(int32(0, -1, -1)[None], int32(40), SIZE)
    with pytest.raises(ValueError, match=f"paged_attention: .*{complaint}"):
        paged_attention(**pool.arguments((0, 45, 46)), selection=selection._replace(**change))
    with pytest.raises(ValueError, match="a tree mask beside a selection"):
        paged_attention(
            **pool.arguments((0, 45, 46), tree_mask=torch.ones(1).bool()), selection=selection
        )


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"qk": torch.zeros(30, 161)}, ValueError, "161 columns are no queries and a key of 40"),
        ({"q_weight": torch.zeros(40).double()}, ValueError, "q_weight is torch.float64"),
        ({"k_weight": torch.zeros(39)}, ValueError, "k_weight has shape"),
        ({"cos_sin": torch.zeros(9, 42)}, ValueError, "cannot rotate 42 of 40 dims"),
        ({"cos_sin": torch.zeros(9, 12)}, RuntimeError, "token 9: position 9"),
        ({"block_positions": torch.full((30,), -1)}, RuntimeError, "token 0: block position -1"),
        ({"key_cache_": torch.zeros(33, 8, 40)}, ValueError, "key_cache_ has shape"),
        ({"block_cache_": torch.zeros(32, 40)}, ValueError, "33 pages of keys, 32 of blocks"),
        ({"block_cache_": torch.zeros(33, 39)}, ValueError, "block_cache has shape"),
        ({"block_size": 0}, ValueError, "for blocks of 0"),
        ({"seq_lens": int32(31)}, RuntimeError, "row 0: "),
    ],
)
def test_refuses_keys(cpu_backend, change, error, complaint):
    indexer = Indexer((30,))
    before, positions = indexer.key_cache.clone(), torch.arange(30)
    arguments = {
        "qk": indexer.qk[0], **indexer.weights, "cos_sin": indexer.cos_sin, "positions": positions,
        "block_positions": positions // SIZE * SIZE, "key_cache_": indexer.key_cache,
        "block_cache_": indexer.block_cache, **indexer.sequences(((0, 0, 30),)),
        "block_size": SIZE,
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        index_keys(**{**arguments, **change}, eps=EPS)
    assert torch.equal(indexer.key_cache.isnan(), before.isnan())


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"q": torch.zeros(30, 120)}, ValueError, "q has shape"),
        ({"q": torch.zeros(30, 3, 40).double()}, ValueError, "q is torch.float64"),
        ({"block_cache": torch.zeros(33, 41)}, ValueError, "block_cache has shape"),
        ({"top_k": 0}, ValueError, "top_k = 0"),
        ({"table_row": int32(2)}, RuntimeError, "row 0: table_row 2 is not one of 2 rows"),
    ],
)
def test_refuses_to_select(cpu_backend, change, error, complaint):
    indexer = Indexer((30,))
    arguments = {
        "q": torch.zeros(30, 3, 40), "block_cache": indexer.block_cache,
        **indexer.sequences(((0, 0, 30),)), "block_size": SIZE, "top_k": 5,
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        select_blocks(**{**arguments, **change})


@pytest.mark.parametrize("P", [1, 16])
def test_no_block_of_so_many_positions_is_complete(native_level, P):
    """Four blocks, or the four of a page, have more positions than 64 bits hold."""
    indexer = Indexer((30,), P=P)
    blocks, tail, _ = select_blocks(
        q=torch.zeros(30, 3, 40), block_cache=indexer.block_cache,
        **indexer.sequences(((0, 0, 30),)), block_size=2**62, top_k=3,
    )  # fmt: skip
    assert (blocks == -1).all()
    assert (tail == 0).all()
