"""The exchange between ranks that share experts: each has tokens of its own."""

import socket
from types import SimpleNamespace as Bag

import torch
from torch import distributed, multiprocessing

from qwen3next_plugin.engines.vllm.cpu.exchange import gather, sum_own

SIZES = [3, 1, 5]
D, TOP = 7, 2


def rows(rank: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Every second column of random ones."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(n, 2 * D, generator=generator).to(dtype)[:, ::2]


def ids(rank: int) -> torch.Tensor:
    return torch.arange(SIZES[rank] * TOP).view(-1, TOP) + 100 * rank


def run(rank: int, port: int) -> None:
    where = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=len(SIZES))
    for dtype in (torch.float32, torch.bfloat16):
        exchange(rank, dtype)
    distributed.destroy_process_group()


def exchange(rank: int, dtype: torch.dtype) -> None:
    """What a rank does, and what it must find."""
    ranks = Bag(rank_in_group=rank, device_group=distributed.group.WORLD)
    x, chosen = gather(ranks, [rows(rank, SIZES[rank], dtype), ids(rank)], 0, SIZES)
    assert x.equal(torch.cat([rows(r, n, dtype) for r, n in enumerate(SIZES)]))
    assert chosen.equal(torch.cat([ids(r) for r in range(len(SIZES))]))
    assert gather(ranks, x[: SIZES[rank]], 0, SIZES).shape == x.shape
    whole = [rows(10 + r, sum(SIZES), dtype).float() for r in range(len(SIZES))]
    own = slice(sum(SIZES[:rank]), sum(SIZES[: rank + 1]))
    found = sum_own(ranks, rows(10 + rank, sum(SIZES), dtype), 0, SIZES)
    assert found.equal(((whole[0] + whole[1]) + whole[2])[own].to(dtype))


def test_ranks_with_different_numbers_of_tokens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    multiprocessing.spawn(run, (port,), nprocs=len(SIZES))
