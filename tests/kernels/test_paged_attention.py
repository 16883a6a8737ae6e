"""Attention over the pool of tokens: as its equation, with bits that depend on the query alone."""

import math
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from engines.load_memory import peak_of
from qwen3next_plugin.kernels.paged_attention import SCRATCH, paged_attention, reference
from tolerances import assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEADS = [(16, 2, 256), (3, 1, 40), (2, 2, 33), (18, 2, 72)]  # Hq, Hkv, D
BLOCK = 256  # positions that are reduced at a time
NOWHERE = 2**31 - 1  # what the table holds beyond a sequence's end


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Pool:
    """Sequences in a pool of slots; slots of no sequence are NaN, and slots have gaps."""

    q: list[Tensor]  # [S, Hq, D] of each sequence: the query of every position
    key_cache: Tensor
    value_cache: Tensor
    token_table: Tensor

    @classmethod
    def random(cls, lengths, heads, dtype) -> "Pool":
        (Hq, Hkv, D), slots = heads, sum(lengths) + 9
        caches = torch.full((2, slots, Hkv + 1, D), torch.nan).to(dtype)[:, :, :Hkv]
        table = torch.full((len(lengths) + 2, max(lengths) + 3), NOWHERE, dtype=torch.int32)
        parts = torch.randperm(slots)[: sum(lengths)].split(list(lengths))
        for row, part in zip(table[1:], parts, strict=False):  # sequence i uses row i + 1
            row[: len(part)] = part
            caches[:, part] = torch.randn(2, len(part), Hkv, D).to(dtype)
        q = [torch.randn(n, Hq, D).to(dtype) for n in lengths]
        return cls(q, *caches, table)

    def arguments(self, *steps, tree_mask=None) -> dict:
        """steps: (sequence, its first token of the step, its end)."""
        q = torch.cat([self.q[i][begin:end] for i, begin, end in steps])
        gaps = torch.full((len(q), q.shape[1] + 1, q.shape[2]), torch.nan, dtype=q.dtype)
        gaps[:, :-1] = q
        counts = [end - begin for _, begin, end in steps]
        return {
            "q": gaps[:, :-1],
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "token_table": self.token_table,
            "table_row": torch.tensor([i + 1 for i, _, _ in steps]),
            "query_start_loc": int32(0, *torch.tensor(counts).cumsum(0).tolist()),
            "seq_lens": torch.tensor([end for _, _, end in steps]),
            "scale": q.shape[-1] ** -0.5,
            "tree_mask": tree_mask,
        }

    def paged(self, P: int) -> dict:
        """The same in pages of P positions: the heads before the positions, keys beside values."""
        _, Hkv, D = self.key_cache.shape
        counts = [-(-len(q) // P) for q in self.q]
        cache = self.key_cache.new_full((sum(counts) + 3, Hkv, P, 2 * D), torch.nan)
        table = torch.full((len(self.token_table), max(counts) + 1), NOWHERE, dtype=torch.int32)
        pages = torch.randperm(len(cache))[: sum(counts)].split(counts)
        for i, part in enumerate(pages, 1):
            table[i, : len(part)] = part
            slots = self.token_table[i, : len(self.q[i - 1])].long()
            both = torch.cat([self.key_cache[slots], self.value_cache[slots]], -1)
            rest = both.new_full((len(part) * P - len(slots), Hkv, 2 * D), torch.nan)
            cache[part] = torch.cat([both, rest]).view(-1, P, Hkv, 2 * D).transpose(1, 2)
        key_cache, value_cache = cache.transpose(1, 2).split(D, -1)
        return {"key_cache": key_cache, "value_cache": value_cache, "token_table": table}

    def __call__(self, *steps, **given) -> Tensor:
        return paged_attention(**self.arguments(*steps, **given))


def exactly(arguments: dict) -> Tensor:
    """The equation in fp64."""
    wide = {name: arguments[name].double() for name in ("q", "key_cache", "value_cache")}
    return reference.run(**{**arguments, **wide})


def trees(*counts: int) -> tuple[Tensor, list[list[int]]]:
    """Flat mask of random trees of these sizes, and each node's path from the root."""
    masks, paths = [], []
    for n in counts:
        of_tree: list[list[int]] = []
        for j in range(n):
            parent = int(torch.randint(j, ())) if j else None
            of_tree.append([*(of_tree[parent] if parent is not None else []), j])
        mask = torch.zeros(n, n, dtype=torch.bool)
        for j, path in enumerate(of_tree):
            mask[j, path] = True
        masks.append(mask.flatten())
        paths += of_tree
    return torch.cat(masks), paths


@cache  # the equation takes longer than all backends
def batch_of_all_kinds(heads, dtype) -> tuple[dict, Tensor]:
    """Arguments, and what the equation makes of them."""
    pool = Pool.random((BLOCK + 1, 600, 77, 1, 300), heads, dtype)
    steps = ((0, BLOCK, BLOCK + 1), (1, 570, 600), (2, 73, 77), (3, 0, 1), (4, 9, 9), (4, 0, 19))
    arguments = pool.arguments(*steps)
    return arguments, exactly(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_against_the_equation(cpu_backend, heads, dtype):
    """Decode, verify, a prefill chunk, a whole prompt and a row without tokens in one batch."""
    arguments, ref = batch_of_all_kinds(heads, dtype)
    out = paged_attention(**arguments)
    assert out.dtype == dtype
    for begin, end in zip(
        *[arguments["query_start_loc"].tolist()[i:] for i in (0, 1)], strict=False
    ):
        assert_close("paged_attention", dtype, out[begin:end], ref[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.uint8], ids=str)
def test_trees_against_the_equation(cpu_backend, mask_dtype, dtype):
    pool = Pool.random((20, BLOCK + 5, 2 * BLOCK), HEADS[1], dtype)
    mask, _ = trees(8, 12, 1)
    steps = ((0, 12, 20), (1, BLOCK - 7, BLOCK + 5), (2, 2 * BLOCK - 1, 2 * BLOCK))
    arguments = pool.arguments(*steps, tree_mask=mask.to(mask_dtype))
    assert_close("paged_attention", dtype, paged_attention(**arguments), exactly(arguments))


@pytest.mark.parametrize("heads", [HEADS[1], HEADS[3]], ids=str)
def test_pages_of_positions(cpu_backend, heads):
    pool = Pool.random((BLOCK + 1, 600, 77, 7), heads, torch.bfloat16)
    steps = ((0, BLOCK, BLOCK + 1), (1, 570, 600), (2, 0, 77), (3, 6, 7))
    arguments = pool.arguments(*steps)
    for mask in (None, trees(1, 30, 77, 1)[0]):
        expected = paged_attention(**arguments | {"tree_mask": mask})
        for P in (1, 7, 32, 300):
            out = paged_attention(**arguments | {"tree_mask": mask} | pool.paged(P))
            assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores(cpu_backend, dtype):
    """Blocks far below the largest score get no weight, and nothing overflows."""
    pool = Pool.random((3 * BLOCK + 7,), HEADS[1], dtype)
    pool.key_cache[pool.token_table[1, : BLOCK // 2].long()] *= 30
    pool.key_cache[pool.token_table[1, 2 * BLOCK + 3].long()] *= 100
    arguments = pool.arguments((0, 3 * BLOCK, 3 * BLOCK + 7))
    assert_close("paged_attention", dtype, paged_attention(**arguments), exactly(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_same_bits_in_any_chunks(bits_level, heads, dtype):
    pool = Pool.random((2 * BLOCK + 41,), heads, dtype)
    S = len(pool.q[0])
    whole = pool((0, 0, S))
    for size in (1, 3, 8, 100, BLOCK):
        starts = range(0, S, size) if size > 8 else range(S - 47 // size * size, S, size)
        for begin in starts:
            end = min(begin + size, S)
            assert torch.equal(pool((0, begin, end)), whole[begin:end]), (begin, end)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_beside_other_rows(bits_level, dtype):
    pool = Pool.random((700, 1300, 40), HEADS[0], dtype)
    steps = ((2, 0, 40), (1, 1299, 1300), (0, 690, 700), (2, 39, 40), (0, 100, 260))
    whole, at = pool(*steps), 0
    for step in steps:
        n = step[2] - step[1]
        assert torch.equal(pool(step), whole[at : at + n])
        at += n


@pytest.fixture
def threads():
    """Sets their number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_on_any_number_of_threads(bits_level, threads, dtype):
    """With one thread no sequence is split."""
    pool = Pool.random((9 * BLOCK + 100, 30), HEADS[0], dtype)
    last = len(pool.q[0])
    steps = ((0, last - 1, last), (0, last - 21, last), (1, 29, 30))
    outs = []
    for number in (1, 2, 5):
        threads(number)
        outs.append(pool(*steps))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def again_and_again(S: int, queries: int) -> dict:
    """A sequence of S positions with the keys and values of few."""
    pool = Pool.random((3 * BLOCK,), HEADS[0], torch.bfloat16)
    n = len(pool.q[0])
    return pool.arguments((0, n - queries, n)) | {
        "token_table": pool.token_table[:, torch.arange(S) % n],
        "seq_lens": torch.tensor([S]),
    }


def test_same_bits_in_windows_of_a_long_sequence(bits_level, threads):
    """Threads that share it merge so many blocks, and then the next."""
    arguments, outs = again_and_again(300 * BLOCK + 9, 2), []
    for number in (1, 2, 5):
        threads(number)
        outs.append(paged_attention(**arguments))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_scratch_memory_does_not_grow_with_the_context(threads):
    arguments = again_and_again(1 << 18, 4)
    threads(2)
    paged_attention(**again_and_again(BLOCK, 4))  # the threads start
    _, taken = peak_of(lambda: paged_attention(**arguments))
    assert taken <= 2 * SCRATCH


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("end", [5, 90, BLOCK, BLOCK + 2, 2 * BLOCK + 9])
def test_same_bits_in_a_tree(bits_level, end, dtype):
    """The mask of a chain is causal; a tree node has the same bits as its path alone."""
    pool, n = Pool.random((2 * BLOCK + 9, 50), HEADS[0], dtype), 5
    step, other = (0, end - n, end), (1, 44, 50)
    chain = torch.ones(n, n, dtype=torch.bool).tril().flatten()
    assert torch.equal(pool(step, tree_mask=chain), pool(step))
    mask, paths = trees(n, 6)
    out = pool(step, other, tree_mask=mask)
    slots = pool.token_table[1, end - n : end].clone()
    for j, path in enumerate(paths[:n]):
        pool.token_table[1, end - n : end - n + len(path)] = slots[path]
        alone = pool.arguments((0, end - n, end - n + len(path)))
        alone["q"] = pool.q[0][end - n : end][path]
        assert torch.equal(paged_attention(**alone)[-1], out[j])
        pool.token_table[1, end - n : end] = slots


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_seen_does_not_matter(bits_level, dtype):
    """Later tokens of the sequence, and those off a node's path, may hold anything."""
    pool = Pool.random((BLOCK + 30,), HEADS[0], dtype)
    before, n = pool((0, 0, BLOCK + 30)), 4
    mask = torch.eye(n, dtype=torch.bool).flatten()
    node = pool((0, BLOCK + 26, BLOCK + 30), tree_mask=mask)[n - 1]
    for first in (BLOCK + 29, BLOCK + 28, BLOCK + 7, BLOCK, 17):
        later = pool.token_table[1, first : BLOCK + 29].long()
        pool.key_cache[later], pool.value_cache[later] = torch.nan, torch.inf
        assert torch.equal(pool((0, 0, BLOCK + 30))[:first], before[:first])
        if first > BLOCK + 25:
            out = pool((0, BLOCK + 26, BLOCK + 30), tree_mask=mask)
            assert torch.equal(out[n - 1], node)


def test_nothing_seen_is_zero(cpu_backend):
    pool = Pool.random((3, 9), HEADS[1], torch.float32)
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.uint8)
    out = pool((0, 0, 3), tree_mask=mask)
    assert not out[1].any()
    assert out[[0, 2]].all(-1).all()
    assert pool((0, 2, 2), (1, 9, 9)).shape == (0, 3, 40)


def test_tokens_of_no_sequence_are_zero(cpu_backend):
    pool = Pool.random((9,), HEADS[1], torch.float32)
    arguments = pool.arguments((0, 0, 9))
    expected = paged_attention(**arguments)
    arguments["query_start_loc"], arguments["seq_lens"] = int32(2, 7), int32(7)
    out = paged_attention(**arguments)
    assert not out[:2].any()
    assert not out[7:].any()
    assert out[2:7].all(-1).all()
    arguments["query_start_loc"] = int32(0)
    arguments["seq_lens"] = arguments["table_row"] = int32()
    assert not paged_attention(**arguments).any()
    assert expected.all(-1).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"query_start_loc": int32(0, 3, 6)}, "row 1: query_start_loc 3 to 6 is not a range of 5"),
        ({"query_start_loc": int32(0, 3, 2)}, "row 1: query_start_loc 3 to 2 is not a range of 5"),
        ({"query_start_loc": int32(-1, 3, 5)}, "row 0: query_start_loc -1 to 3"),
        ({"table_row": int32(1, 4)}, "row 1: table_row 4 is not one of 4 rows"),
        ({"table_row": int32(-1, 2)}, "row 0: table_row -1 is not one of 4 rows"),
        ({"seq_lens": int32(7, 1)}, "row 1: seq_lens 1 is not between its 2 tokens and 12"),
        ({"seq_lens": int32(13, 9)}, "row 0: seq_lens 13 is not between its 3 tokens and 12"),
        ({"seq_lens": int32(8, 9)}, f"row 0: position 7 is in page {NOWHERE}, not one of 25 pages"),
        ({"tree_mask": torch.ones(12).bool()}, "row 1: its 2 x 2 entries end beyond the 12 of"),
        ({"tree_mask": torch.ones(0).bool()}, "row 0: its 3 x 3 entries end beyond the 0 of"),
        ({"tree_mask": torch.ones(14).bool()}, "tree_mask has 14 entries, the rows 13"),
    ],
)
def test_refuses_what_cannot_be(cpu_backend, change, complaint):
    pool = Pool.random((7, 9), HEADS[1], torch.float32)
    arguments = pool.arguments((0, 4, 7), (1, 7, 9))
    with pytest.raises(RuntimeError, match=complaint):
        paged_attention(**{**arguments, **change})


@pytest.mark.parametrize("slot", [-1, 25, -(2**31)])
def test_refuses_what_is_no_slot(cpu_backend, slot):
    pool = Pool.random((7, 9), HEADS[1], torch.float32)
    pool.token_table[2, 3] = slot
    pool((0, 4, 7), (1, 2, 3))
    with pytest.raises(RuntimeError, match=f"row 1: position 3 is in page {slot}, not one of 25"):
        pool((0, 4, 7), (1, 7, 9))


@pytest.mark.parametrize("page", [-1, 7])
def test_refuses_what_is_no_page(cpu_backend, page):
    pool = Pool.random((7, 9), HEADS[1], torch.float32)
    arguments = pool.arguments((0, 4, 7), (1, 7, 9)) | pool.paged(6)
    arguments["token_table"][2, 1] = page
    with pytest.raises(RuntimeError, match=f"row 1: position 6 is in page {page}, not one of 7"):
        paged_attention(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("q", lambda x: x.double(), r"q is torch\.float64"),
        ("q", lambda x: x[0], r"q has shape \(4, 40\), not 3 dims"),
        ("key_cache", lambda x: x[0, 0], r"key_cache has shape \(40,\), not 3 dims"),
        ("q", lambda x: x[:, :3], "cannot serve 3 query heads of 40 dims with 2 kv heads"),
        ("q", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), "slot of q is not"),
        ("q", lambda x: torch.zeros(5, 4, 257), "cannot serve 4 query heads of 257 dims"),
        ("key_cache", lambda x: x[:, :, :39], "key_cache has shape"),
        ("key_cache", lambda x: x[:, None], "value_cache has shape"),
        ("key_cache", lambda x: x[:24], "24 pages of keys, 25 of values"),
        ("value_cache", lambda x: x.bfloat16(), r"value_cache is torch\.bfloat16"),
        ("token_table", lambda x: x.long(), r"token_table is torch\.int64"),
        ("token_table", lambda x: x[0], "token_table has shape"),
        ("table_row", lambda x: x.float(), r"table_row is torch\.float32"),
        ("query_start_loc", lambda x: x[:-1], "query_start_loc has shape"),
        ("query_start_loc", lambda x: x.long(), r"query_start_loc is torch\.int64"),
        ("seq_lens", lambda x: x[:-1], "seq_lens has shape"),
        ("tree_mask", lambda _: torch.ones(13), r"tree_mask is torch\.float32"),
        ("tree_mask", lambda _: torch.ones(1, 13).bool(), "tree_mask has shape"),
        ("q", lambda x: x[:, :0], "cannot serve 0 query heads"),
        ("scale", lambda _: 0.0, r"scale is 0\.0, not above 0"),
        ("scale", lambda _: math.nan, "scale is nan, not above 0"),
    ],
)
def test_refuses(cpu_backend, name, change, complaint):
    pool = Pool.random((7, 9), (4, 2, 40), torch.float32)
    arguments = pool.arguments((0, 4, 7), (1, 7, 9))
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=f"paged_attention: .*{complaint}"):
        paged_attention(**arguments)
