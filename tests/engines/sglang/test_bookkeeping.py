"""The stand-in's bookkeeping operators against plain loops."""

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide

provide()
kernels = import_module("sgl_kernel")
CANARY = -77


def table(rows: int, columns: int) -> torch.Tensor:
    """A request-to-token table whose rows do not lie end to end."""
    return torch.randperm(rows * (columns + 3)).int().view(rows, columns + 3)[:, :columns]


@st.composite
def spans(draw):
    """(start, end, table row) of up to five requests; tables of 11 columns, 7 rows."""
    N = draw(st.integers(0, 5))
    start = [draw(st.integers(0, 11)) for _ in range(N)]
    end = [draw(st.integers(low, 11)) for low in start]
    rows = draw(st.permutations(range(7)))[:N]
    return [torch.tensor(x, dtype=torch.int64) for x in (start, end, rows)]


@settings(deadline=None)
@given(spans(), st.sampled_from([torch.int32, torch.int64]))
def test_assign_req_to_token_pool(spans, dtype):
    start, end, rows = spans
    pool, slots = table(7, 11), torch.arange(1000, 1000 + int((end - start).sum()) + 2)
    expected, taken = pool.clone(), iter(slots.tolist())
    for row, low, high in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        for column in range(low, high):
            expected[row, column] = next(taken)
    whole = pool.as_strided((7, 14), (14, 1))
    beyond = whole[:, 11:].clone()
    kernels.assign_req_to_token_pool_cpu(rows, pool, start.to(dtype), end.to(dtype), slots, 11)
    assert torch.equal(pool, expected)
    assert torch.equal(whole[:, 11:], beyond)


@settings(deadline=None)
@given(spans(), st.sampled_from([torch.int32, torch.int64]))
def test_assign_extend_cache_locs(spans, dtype):
    start, end, rows = spans
    pool = table(7, 11)
    expected = [
        int(pool[row, column])
        for row, low, high in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True)
        for column in range(low, high)
    ]
    out = torch.full((len(expected) + 3,), CANARY)
    kernels.assign_extend_cache_locs_cpu(rows, pool, start.to(dtype), end.to(dtype), out, 11)
    assert out.tolist() == expected + [CANARY] * 3


@pytest.mark.parametrize("N", [0, 1, 3])
@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_draft_locations(N, topk, steps, dtype):
    pool, rows, seq_lens = table(5, 13), torch.randperm(5)[:N], torch.randint(0, 8, (N,))
    out = torch.full((N * topk * steps + 2,), CANARY)
    kernels.assign_draft_cache_locs_contiguous_cpu(
        rows, pool, seq_lens.to(dtype), out, 13, topk, steps
    )
    expected = [int(pool[rows[i], seq_lens[i] + j]) for i in range(N) for j in range(topk * steps)]
    assert out.tolist() == expected + [CANARY] * 2


@pytest.mark.parametrize("N", [0, 1, 3])
@pytest.mark.parametrize(("topk", "steps"), [(1, 3), (3, 2)])
def test_draft_decode_metadata(N, topk, steps):
    """Candidate c's step s reads the committed slots and its own drafts, nobody else's."""
    pool, rows, seq_lens = table(5, 13), torch.randperm(5)[:N], torch.randint(0, 8, (N,))
    got = kernels.build_draft_decode_metadata_cpu(pool, rows, seq_lens, topk, steps, 13)
    assert got.dtype == torch.int32
    assert got.shape[0] == N * topk
    for i in range(N):
        committed = pool[rows[i], : seq_lens[i]].tolist()
        for c in range(topk):
            own = pool[rows[i], seq_lens[i] + c * steps :][:steps].tolist()
            length = int(seq_lens[i]) + steps
            assert got[i * topk + c, :length].tolist() == committed + own


@pytest.mark.parametrize("N", [0, 1, 5])
def test_bonus_tokens(N):
    stride = 4
    tokens, lens = torch.randint(0, 99, (N * stride,)).int(), torch.randint(1, 5, (N,)).int()
    bonus = torch.full((N + 2,), CANARY, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(tokens, lens, bonus, stride)
    expected = [int(tokens[i * stride + lens[i] - 1]) for i in range(N)]
    assert bonus.tolist() == expected + [CANARY] * 2


@settings(deadline=None)
@given(st.lists(st.integers(-1, 9), max_size=12))
def test_accepted_locations(accept_index):
    slots, out = torch.randint(0, 99, (10,)), torch.full((14,), CANARY)
    index = torch.tensor(accept_index, dtype=torch.int32)
    kernels.fill_accept_out_cache_loc_cpu(index, slots, out)
    expected = [int(slots[i]) for i in accept_index if i >= 0]
    assert out.tolist() == expected + [CANARY] * (14 - len(expected))


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=5), st.booleans(), st.booleans())
def test_rotate_input_ids(lengths, selects, column):
    T, N = sum(lengths), len(lengths)
    lens = torch.tensor(lengths, dtype=torch.int32)
    start = (lens.cumsum(0) - lens).int()
    ids, new = torch.randint(0, 99, (T + 2,)), torch.arange(100, 100 + N)
    select = (start + (lens - 1).clamp(min=0) // 2).long() if selects else None
    expected = ids.tolist()
    for i, length in enumerate(lengths):
        low = int(start[i])
        if length:
            expected[low : low + length - 1] = expected[low + 1 : low + length]
            expected[low + length - 1 if select is None else int(select[i])] = 100 + i
    kernels.rotate_input_ids_cpu(ids, start, lens, new[:, None] if column else new, select)
    assert ids.tolist() == expected


def pools(layers: int, slots: int) -> list[torch.Tensor]:
    return [torch.randn(slots, 2, 3 + layer) for layer in range(layers)]


def addresses(caches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.tensor([c.data_ptr() for c in caches], dtype=torch.uint64),
        torch.tensor([c[0].numel() * c.element_size() for c in caches]),
    )


@settings(deadline=None)
@given(st.permutations(range(9)), st.permutations(range(9)), st.integers(0, 9))
def test_kv_copy_reads_all_before_it_writes(target, source, count):
    caches = pools(3, 9)
    expected = [cache.clone() for cache in caches]
    for old, new in zip(caches, expected, strict=True):
        for to, of in zip(target[:count], source[:count], strict=True):
            new[to] = old[of]
    moves = [torch.tensor(x[:count], dtype=torch.int64) for x in (target, source)]
    kernels.copy_all_layer_kv_cache_cpu(*addresses(caches), *moves)
    assert all(torch.equal(a, b) for a, b in zip(caches, expected, strict=True))


def test_kv_copy_refuses_a_negative_slot():
    caches = pools(2, 4)
    before = [cache.clone() for cache in caches]
    with pytest.raises(IndexError, match="slot -1 is negative"):
        kernels.copy_all_layer_kv_cache_cpu(
            *addresses(caches), torch.tensor([1]), torch.tensor([-1])
        )
    assert all(torch.equal(a, b) for a, b in zip(caches, before, strict=True))


def test_a_slot_beyond_the_table_is_refused():
    one = torch.tensor([0])
    with pytest.raises(IndexError):
        kernels.assign_extend_cache_locs_cpu(
            one, table(2, 5), one + 4, one + 7, torch.zeros(3, dtype=torch.int64), 5
        )


def test_traced_whole():
    """A graph holds the operators, the one that returns a table of unknown width included."""
    pool, rows, seq_lens = table(5, 13), torch.tensor([3, 1]), torch.tensor([4, 6])

    def step(pool, rows, seq_lens, out, bonus):
        kernels.assign_draft_cache_locs_contiguous_cpu(rows, pool, seq_lens, out, 13, 1, 3)
        kernels.fill_bonus_tokens_cpu(out, seq_lens.clamp(max=3), bonus, 3)
        grown = kernels.build_draft_decode_metadata_cpu(pool, rows, seq_lens, 1, 3, 13)
        return grown + 1

    def run(step):
        out, bonus = torch.zeros(6, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        return step(pool, rows, seq_lens, out, bonus), out, bonus

    graph = run(torch.compile(step, backend="aot_eager", fullgraph=True))
    assert all(torch.equal(a, b) for a, b in zip(graph, run(step), strict=True))


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 from state 0, of whole words."""
    state = 0
    for at in range(0, len(data), 4):
        word = int.from_bytes(data[at : at + 4], "little") * 0xCC9E2D51 % 2**32
        word = (word << 15 | word >> 17) * 0x1B873593 % 2**32
        state ^= word
        state = ((state << 13 | state >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    state ^= len(data)
    state = (state ^ state >> 16) * 0x85EBCA6B % 2**32
    state = (state ^ state >> 13) * 0xC2B2AE35 % 2**32
    return state ^ state >> 16


def test_the_plain_hash_is_the_published_one():
    assert murmur3(b"test") == 0xBA6BD213


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1)), max_size=4),
    st.lists(st.integers(0, 2**32 - 1), max_size=4),
    st.booleans(),
)
def test_hash(rows, columns, signed):
    seeds = [seed % 2**63 if signed else seed for seed, _ in rows]
    got = torch.ops.sgl_kernel.murmur_hash32_cpu.default(
        torch.tensor(seeds, dtype=torch.int64 if signed else torch.uint64),
        torch.tensor([position for _, position in rows], dtype=torch.uint64),
        torch.tensor(columns, dtype=torch.int64),
    )
    assert got.dtype == torch.uint32
    assert got.shape == (len(rows), len(columns))
    for seed, (_, position), line in zip(seeds, rows, got.tolist(), strict=True):
        words = seed.to_bytes(8, "little") + position.to_bytes(4, "little")
        assert line == [murmur3(words + column.to_bytes(4, "little")) for column in columns]


@pytest.mark.parametrize("name", ["causal_conv1d_fn_cpu", "chunk_gated_delta_rule_cpu"])
def test_unserved_functions_say_so(name):
    with pytest.raises(NotImplementedError, match=rf"{name}, called by .*Gated DeltaNet"):
        getattr(import_module("sgl_kernel.mamba"), name)(1, more=2)


@pytest.mark.parametrize(
    "name", ["convert_weight_packed", "fused_qk_norm_cpu", "fused_qk_norm_rope_cpu"]
)
def test_what_the_host_asks_for_before_it_calls_is_absent(name):
    assert not hasattr(torch.ops.sgl_kernel, name)


def test_every_unserved_operator_says_so():
    unserved = import_module("sgl_kernel.unserved")
    for name in (*unserved.TAKEN_ON_IMPORT, *unserved.GIVEN_A_FAKE):
        with pytest.raises(NotImplementedError, match=f"{name}, called by"):
            getattr(torch.ops.sgl_kernel, name)(torch.zeros(1))


def test_unserved_operators_say_so():
    with pytest.raises(NotImplementedError, match=r"fused_sigmoid_mul_cpu, called by Qwen3\.5"):
        torch.ops.sgl_kernel.fused_sigmoid_mul_cpu(torch.zeros(1), torch.zeros(1))
