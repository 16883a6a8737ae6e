"""The draft head: from whatever it reads the output head, drafts are those of a whole int8 copy."""

import pytest
import torch

from qwen3next_plugin.kernels.draft_head import draft_head, quantise_channels
from qwen3next_plugin.kernels.linear import pack_bf16, pack_int8
from qwen3next_plugin.mtp import draft_head as module
from qwen3next_plugin.mtp.draft_head import DraftHead

VOCAB, SIZE, D = 4099, 1200, 72


class Ranks:
    """Ranks that hold a head's parts, each with the others' answers at hand."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.pairs: list[torch.Tensor] = []

    def all_gather(self, input_: torch.Tensor, dim: int) -> torch.Tensor:
        self.pairs.append(input_)
        return torch.cat(self.pairs[-self.world_size :], dim)


@pytest.fixture(autouse=True)
def few_are_drafted(monkeypatch):
    monkeypatch.setattr(module, "DRAFTED", SIZE)
    monkeypatch.setattr(module, "CHANNELS", 100)


@pytest.fixture
def plain() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(VOCAB, D, generator=generator).bfloat16()


def held(kind: str, plain: torch.Tensor):
    if kind == "bf16":
        return pack_bf16(plain)
    if kind == "int8":
        values, scale = quantise_channels(plain)
        return pack_int8(values, scale[:, None])
    return plain


def make(head, first=0, end=VOCAB, ranks=1, stays=True) -> DraftHead:
    """A draft head made while the engine's dtype is torch's default, as it is during a load."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return DraftHead(
            head, stays=stays, first=first, end=end, vocab_size=VOCAB, ranks=Ranks(ranks)
        )
    finally:
        torch.set_default_dtype(before)


def steps() -> list[torch.Tensor]:
    """Tokens of steps, few and many, some twice, and more than there are places."""
    generator = torch.Generator().manual_seed(7)
    sizes = (1, 3, 400, 2, 2000, 1, 50)
    return [torch.randint(VOCAB, (size,), generator=generator) for size in sizes]


@pytest.mark.parametrize("kind", ["plain", "bf16", "int8"])
def test_drafts_are_those_of_a_whole_copy(plain, kind):
    weight, scale = quantise_channels(plain)
    head, copy = make(held(kind, plain)), make(plain.clone(), stays=False)
    assert head.weight.shape == (SIZE, D)
    assert copy.weight.shape == (VOCAB, D)
    for i, token_ids in enumerate(steps()):
        x = torch.randn(5, D, generator=torch.Generator().manual_seed(i))
        ids = head.vocabulary.ids
        want, _ = draft_head(x=x, weight=weight, scale=scale, token_ids=ids)
        assert torch.equal(head(x), want)
        assert torch.equal(copy(x), want)
        assert torch.equal(head.weight, weight[ids])
        assert torch.equal(head.scale, scale[ids])
        for each in (head, copy):
            each.see(token_ids)


@pytest.mark.parametrize("kind", ["plain", "bf16"])
def test_ranks_draft_what_one_does(plain, kind):
    """One rank's rows are more than the drafted ones, the other's fewer."""
    whole, between = make(plain), 2800
    parts = [
        make(held(kind, plain[:between]), 0, between, ranks=2),
        make(held(kind, plain[between:]), between, VOCAB, ranks=2),
    ]
    for part in parts:
        part.ranks = parts[0].ranks
    for i, token_ids in enumerate(steps()):
        x = torch.randn(5, D, generator=torch.Generator().manual_seed(i))
        parts[1].ranks.pairs.append(torch.full((5, 1, 2), -torch.inf))
        parts[0](x)  # sees only itself
        assert torch.equal(parts[1](x), whole(x))
        for each in (whole, *parts):
            each.see(token_ids)


def test_a_rank_with_few_rows_copies_them(plain):
    head = make(plain[: SIZE - 1], 0, SIZE - 1)
    assert head.head is None
    assert head.weight.shape == (SIZE - 1, D)
