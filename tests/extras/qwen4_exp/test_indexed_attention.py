"""Sparse attention reads the same of caches with many tokens in a page, and with one."""

import pytest
import torch

from qwen3next_plugin.extras.qwen4_exp.indexed_attention import BlockRule, Caches, Tokens, attend

T, P, HQ, H, D, HI, d = 70, 32, 4, 2, 16, 3, 8
RULE = BlockRule(block_size=4, top_k=5, eps=1e-6)


def run(caches: Caches, table: torch.Tensor, *, first: int, count: int, page: int) -> torch.Tensor:
    """Attend to tokens `first` on of a sequence."""
    chance = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance)

    q, k, v, index_qk = draw(T, HQ, D), draw(T, H, D), draw(T, H, D), draw(T, (HI + 1) * d)
    positions = torch.arange(T)
    slots = table[0, positions // page].long() * page + positions % page
    part = slice(first, first + count)
    return attend(
        q=q[part],
        k=k[part],
        v=v[part],
        index_qk=index_qk[part],
        q_weight=draw(d),
        k_weight=draw(d),
        cos_sin=draw(T, 4),
        positions=positions[part],
        caches_=caches,
        tokens=Tokens(
            slots=slots[part],
            token_table=table,
            table_row=torch.tensor([0]),
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([first + count]),
        ),
        scale=D**-0.5,
        rule=RULE,
    )


@pytest.mark.parametrize("end", [66, 67, 68])
def test_pages_of_one_token_give_the_same_bits(end):
    """In two steps, the first of which ends anywhere in a block."""
    pages = torch.zeros(5, P * (2 * H * D + d + d // RULE.block_size + 1))
    of_many = Caches.view(pages, P=P, heads=H, dims=D, index_dims=d, block_size=RULE.block_size)
    table = torch.tensor([[3, 0, 4]], dtype=torch.int32)
    rows = torch.zeros(2, 200, H * D + d + 3)
    of_one = Caches.of_tokens(*rows, heads=H, dims=D, index_dims=d)
    scattered = torch.randperm(200, generator=torch.Generator().manual_seed(1))[None, :T].int()
    for first, count in ((0, end), (end, T - end)):
        expected = run(of_many, table, first=first, count=count, page=P)
        found = run(of_one, scattered, first=first, count=count, page=1)
        assert torch.equal(found, expected)
    assert not rows[:, :, H * D + d :].any()
