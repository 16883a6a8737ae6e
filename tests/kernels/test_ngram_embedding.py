"""N-gram embeddings: transformers' hashes and rows, tables of every dtype, rings in every state."""

from types import SimpleNamespace

import pytest
import torch
from rings import Rings
from state_pages import Step
from torch import Tensor
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpTextNGramEmbedding

from qwen3next_plugin.kernels.ngram_embedding import (
    NgramHash,
    NgramTable,
    ngram_embedding,
    ngram_hash,
)

DRAFTS, EOS, VOCAB = 2, 3, 50
HEADS, D = 4, 6  # of an n-gram, and features of a row
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def module_of(n: int = 3, layer: int = 0, base: int = 101) -> Qwen4ExpTextNGramEmbedding:
    config = SimpleNamespace(
        ngram_size=n, heads_per_ngram=HEADS, vocab_size=VOCAB, ngram_vocab_size_base=base,
        seed=1234, eos_token_id=[EOS, 9], make_ngram_vocab_size_divisible_by=128,
    )  # fmt: skip
    return Qwen4ExpTextNGramEmbedding(config, (n - 1) * HEADS * D, 0, layer).requires_grad_(False)


def hash_of(n: int = 3, layer: int = 0, base: int = 101) -> NgramHash:
    return ngram_hash(
        ngram_size=n, heads_per_ngram=HEADS, vocab_size=VOCAB, table_size=base, layer=layer,
        seed=1234, eos=EOS,
    )  # fmt: skip


def table_of(weight: Tensor, shards: int = 3) -> NgramTable:
    """In shards that are not beside each other."""
    rows = -(-len(weight) // shards)
    return NgramTable.of([part.clone() for part in weight.split(rows)], mapped=False)


def rings_of(slots: int, n: int = 3) -> Rings:
    return Rings(slots, n + DRAFTS, dtype=torch.int32)


def tokens_of(T: int) -> Tensor:
    """Of a small vocabulary, so that ends are among them."""
    return torch.randint(0, 8, (T,))


def embed(tokens, table, hashing, rings, *rows, out_dtype=torch.float32):
    return ngram_embedding(
        token_ids=tokens, table=table, hashing=hashing, tokens_=rings.rings, span=rings.span,
        step=Step(rows).bundle(len(tokens)), out_dtype=out_dtype,
    )  # fmt: skip


@pytest.mark.parametrize(("n", "layer", "base"), [(3, 0, 101), (2, 1, 7), (4, 2, 1000)])
def test_hash_of_the_model(n, layer, base):
    module, hashing = module_of(n, layer, base), hash_of(n, layer, base)
    assert hashing.multipliers.tolist() == module.layer_multipliers.tolist()
    assert hashing.sizes.tolist() == module.head_vocab_sizes
    assert hashing.offsets.tolist() == module.head_offsets


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("T", [1, 2, 40, 300])
def test_against_the_model(cpu_backend, T, n, ids):
    module, rings, tokens = module_of(n), rings_of(2, n), tokens_of(T)
    theirs = module(tokens[None], None)[0]
    table = table_of(module.ngram_embedding.weight.data)
    out = embed(tokens.to(ids), table, hash_of(n), rings, (1, 0, T))
    assert torch.equal(out, theirs)
    assert torch.equal(rings.of(1, range(max(0, T - n + 1), T)), tokens[-n + 1 :].int())
    assert rings.untouched() == [0]


def test_split_anywhere(cpu_backend):
    """Chunks, and a draft of which tokens are rejected."""
    module, T = module_of(), 60
    table, hashing, tokens = table_of(module.ngram_embedding.weight.data), hash_of(), tokens_of(T)
    whole = module(tokens[None], None)[0]
    for cut in (1, 2, 3, 11, 40):
        rings = rings_of(1)
        assert torch.equal(embed(tokens[:cut], table, hashing, rings, (0, 0, cut)), whole[:cut])
        rings.set_span(0, cut, cut)
        draft = torch.cat([tokens[cut : cut + 1], tokens_of(DRAFTS)])
        embed(draft, table, hashing, rings, (0, cut, 1 + DRAFTS))
        rings.set_span(0, cut, cut + 1 + DRAFTS)
        rest = embed(tokens[cut + 1 :], table, hashing, rings, (0, cut + 1, T - cut - 1))
        assert torch.equal(rest, whole[cut + 1 :])


def test_mixed_batch(cpu_backend):
    module, hashing, rings = module_of(), hash_of(), rings_of(4)
    table = table_of(module.ngram_embedding.weight.data)
    first, tokens = tokens_of(5), tokens_of(12)
    embed(first, table, hashing, rings, (3, 0, 5))
    rings.set_span(3, 5, 5)
    out = embed(tokens, table, hashing, rings, (1, 0, 7), (-1, 5, 2), (3, 5, 3), (0, 0, 0))
    assert torch.equal(out[:7], module(tokens[None, :7], None)[0])
    assert (out[7:9] == 0).all()
    kept = torch.cat([first, tokens[9:]])
    assert torch.equal(out[9:], module(kept[None], None)[0][5:])
    assert rings.untouched() == [0, 2]


def test_a_fresh_row_ignores_its_page(cpu_backend):
    module, rings, tokens = module_of(), rings_of(1), tokens_of(4)
    rings.set_span(0, 17, 18)
    out = embed(tokens, table_of(module.ngram_embedding.weight.data), hash_of(), rings, (0, 0, 4))
    assert torch.equal(out, module(tokens[None], None)[0])


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "stored", [*DTYPES, torch.float8_e4m3fn, torch.int8, "int8 by row"], ids=str
)
def test_stored_dtypes(cpu_backend, stored, out_dtype):
    """Each value times its scale, in fp32, rounded once."""
    hashing, tokens = hash_of(), tokens_of(30)
    rows, scale = int(hashing.sizes.sum()) + 5, None
    if stored in (torch.int8, "int8 by row"):
        values = torch.randint(-127, 128, (rows, D), dtype=torch.int8)
        scale = torch.rand(1 if stored is torch.int8 else rows)
    else:
        values = torch.randn(rows, D).to(stored)
        scale = torch.tensor([0.37]) if stored is torch.float8_e4m3fn else None
    if stored is torch.float8_e4m3fn:
        every = torch.arange(256, dtype=torch.uint8)
        codes = every[(every & 127) != 127].repeat(-(-rows * D // 254))[: rows * D]
        values = codes[torch.randperm(rows * D)].view(rows, D).view(torch.float8_e4m3fn)
    wide = values.float() if scale is None else values.float() * scale.reshape(-1, 1)
    expected = embed(tokens, table_of(wide), hashing, rings_of(1), (0, 0, 30))
    table = NgramTable.of([*values.split(97)], scale=scale, mapped=False)
    out = embed(tokens, table, hashing, rings_of(1), (0, 0, 30), out_dtype=out_dtype)
    assert torch.equal(out, expected.to(out_dtype))


def test_a_mapped_file(cpu_backend, tmp_path):
    hashing, tokens = hash_of(), tokens_of(30)
    weight = torch.randn(int(hashing.sizes.sum()), D).bfloat16()
    path = tmp_path / "table"
    path.write_bytes(b"head" + weight.view(torch.uint8).numpy().tobytes())
    raw = torch.from_file(str(path), shared=True, size=4 + weight.nbytes, dtype=torch.uint8)
    bytes_of = raw[4:].view(torch.bfloat16) if raw.data_ptr() % 4 == 0 else None
    assert bytes_of is not None
    table = NgramTable.of([bytes_of.view(-1, D)], mapped=True)
    out = embed(tokens, table, hashing, rings_of(1), (0, 0, 30))
    assert torch.equal(out, embed(tokens, table_of(weight), hashing, rings_of(1), (0, 0, 30)))


@pytest.mark.parametrize(
    ("change", "error", "complaint"),
    [
        ({"token_ids": torch.zeros(3)}, ValueError, "token_ids is torch.float32"),
        ({"tokens_": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "tokens_ holds 2 tokens"),
        ({"tokens_": torch.zeros(2, 5)}, ValueError, "tokens_ is torch.float32"),
        ({"span": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "span has shape"),
        ({"out_dtype": torch.int8}, ValueError, "out_dtype is torch.int8"),
        ({"sizes": torch.ones(7, dtype=torch.int64)}, ValueError, "7 heads for n-grams of 2 to 3"),
        ({"offsets": torch.zeros(7, dtype=torch.int64)}, ValueError, "offsets has shape"),
        ({"sizes": torch.full((8,), 10**6)}, RuntimeError, "head 0: rows 0 to 1000000 are not"),
        ({"sizes": torch.zeros(8, dtype=torch.int64)}, RuntimeError, "head 0: rows 0 to 0 are not"),
        ({"offsets": torch.full((8,), -1)}, RuntimeError, "head 0: rows -1 to"),
    ],
)
def test_refuses(cpu_backend, change, error, complaint):
    rings, hashing = rings_of(2), hash_of()
    fields = {name: change[name] for name in hashing._fields if name in change}
    change = {name: value for name, value in change.items() if name not in fields}
    arguments = {
        "token_ids": tokens_of(3), "table": table_of(torch.zeros(int(hashing.sizes.sum()), D)),
        "hashing": hashing._replace(**fields), "tokens_": rings.rings, "span": rings.span,
        "step": Step(((0, 0, 3),)).bundle(), "out_dtype": torch.float32,
    }  # fmt: skip
    with pytest.raises(error, match=complaint):
        ngram_embedding(**{**arguments, **change})
    assert rings.untouched() == [0, 1]


@pytest.mark.parametrize(
    ("shards", "scale"),
    [
        ([torch.zeros(4, 6), torch.zeros(5, 6)], None),
        ([torch.zeros(4, 6), torch.zeros(3, 6), torch.zeros(4, 6)], None),
        ([torch.zeros(4, 6), torch.zeros(4, 7)], None),
        ([torch.zeros(4, 6), torch.zeros(4, 6).bfloat16()], None),
        ([torch.zeros(6, 4).t()], None),
        ([torch.zeros(4, 6, dtype=torch.int8)], None),
        ([torch.zeros(4, 6)], torch.ones(1)),
        ([torch.zeros(4, 6, dtype=torch.int8)], torch.ones(3)),
        ([torch.zeros(4, 6, dtype=torch.float64)], None),
    ],
)
def test_no_table(shards, scale):
    with pytest.raises(ValueError, match="n-gram table"):
        NgramTable.of(shards, scale=scale, mapped=False)
