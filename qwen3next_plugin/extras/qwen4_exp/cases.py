"""Small inputs for the kernels that only Qwen4-Exp launches, for the self-check."""

from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.extras.qwen4_exp.config import of_kind
from qwen3next_plugin.extras.qwen4_exp.ngrams import hashing
from qwen3next_plugin.extras.self_check.cases import TOKENS, Case, Draw, Outputs, Run, Served
from qwen3next_plugin.kernels.draft_head import quantise_channels
from qwen3next_plugin.kernels.hyper_connection import HyperConnectionWeights, takes_packed
from qwen3next_plugin.kernels.linear import PackedWeight, pack_bf16, pack_int8
from qwen3next_plugin.kernels.ngram_embedding import NgramTable
from qwen3next_plugin.kernels.ple_gate import PLENorms
from qwen3next_plugin.kernels.step import Step

ROWS = (3, 20)  # tokens of each, in two steps


def cases(served: Served, backend: str) -> dict[str, Case]:
    """The case of each op that this backend runs for the model, beside the family's."""
    config = of_kind(served.config)
    if backend != "cpu":
        return {}
    found: dict[str, Case] = {"hyper_connection": _hyper_connection}
    if config.ple_layer_ids:
        found |= {
            "dilated_conv1d": _dilated_conv1d,
            "ngram_embedding": _ngram_embedding,
            "ple_gate": _ple_gate,
        }
    if config.indexer_n_heads:
        found |= {"index_keys": _index_keys, "select_blocks": _select_blocks}
    return found


def _hyper_connection(run: Run, served: Served, draw: Draw) -> Outputs:
    c, eps = of_kind(served.config), served.config.rms_norm_eps
    hc, D, rank = c.hc_count, c.hidden_size, c.hc_lowrank
    streams, block, injection = draw(TOKENS, hc, D), draw(TOKENS, D), draw(TOKENS, hc).float()
    norm, gates = draw(hc * D) / 10, draw(hc, hc * D) / D**0.5
    down, up = draw(rank, hc * D) / D**0.5, draw(hc * D, rank) / rank**0.5
    mixing: list[tuple[Any, Any]] = [(down, up)]
    if takes_packed(D):
        mixing.append((pack_bf16(down.bfloat16()), pack_bf16(up.bfloat16())))
        mixing.append((_int8(down), _int8(up)))
    for weights in mixing:
        for inject in (gates, None):
            every = HyperConnectionWeights(norm, *weights, inject)
            mixed, found = run(streams, every, eps, block, injection)
            yield f"{hc} streams of {D}", mixed
            yield "the streams", streams
            if inject is not None:
                yield "the injection", found


def _int8(weight: Tensor) -> PackedWeight:
    values, scale = quantise_channels(weight)
    return pack_int8(values, scale[:, None])


def _ple_gate(run: Run, served: Served, draw: Draw) -> Outputs:
    hc, D = of_kind(served.config).hc_count, served.config.hidden_size
    streams, keys, values = draw(TOKENS, hc, D), draw(TOKENS, hc * D), draw(TOKENS, D)
    norms = PLENorms(*(draw(hc * D) / 10 for _ in range(3)))
    block = draw(TOKENS, D)
    out = run(streams, keys, values, norms, served.config.rms_norm_eps, block, None)
    yield f"{hc} streams of {D}, gated", out[0]
    yield "and normed", out[1]


def _step(draw: Draw, lengths: tuple[int, ...], contexts: tuple[int, ...]) -> Step:
    starts = [0, *accumulate(lengths)]
    return Step(
        query_start_loc=draw.tensor(starts),
        slot=draw.tensor([*range(len(lengths))]),
        context_len=draw.tensor([*contexts]),
        num_tokens=sum(lengths),
        max_query_len=max(lengths),
    )


def _dilated_conv1d(run: Run, served: Served, draw: Draw) -> Outputs:
    c, drafts = of_kind(served.config), served.layout.num_drafts
    C, weight = 64, draw(64, 4) / 2
    ring = draw(len(ROWS), c.ple_conv_reach + 1 + drafts, C)
    span, contexts = draw.tensor([0] * 2 * len(ROWS)).view(-1, 2), (0,) * len(ROWS)
    for lengths in (ROWS, (drafts + 1,) * len(ROWS)):
        step = _step(draw, lengths, contexts)
        yield (
            f"rows of {lengths}",
            run(draw(sum(lengths), C), weight, c.ngram_size, ring, span, step),
        )
        contexts = lengths
        span.copy_(draw.tensor([*contexts])[:, None])


def _ngram_embedding(run: Run, served: Served, draw: Draw) -> Outputs:
    c, drafts = of_kind(served.config), served.layout.num_drafts
    i = c.ple_layer_ids[0] - 1
    hashes = hashing(c, i)._replace(
        sizes=torch.tensor([7] * c.num_ngram_heads), offsets=7 * torch.arange(c.num_ngram_heads)
    )
    table = NgramTable.of([draw(7 * c.num_ngram_heads, c.ngram_head_dim)], mapped=False)
    tokens = draw.integers(0, c.vocab_size, len(ROWS), c.ngram_size + drafts, dtype=torch.int32)
    span = draw.tensor([0] * 2 * len(ROWS)).view(-1, 2)
    ids = draw.integers(0, c.vocab_size, sum(ROWS), dtype=torch.int64)
    ids[::5] = c.eos_token_id
    step = _step(draw, ROWS, (0,) * len(ROWS))
    yield f"rows of {ROWS}", run(ids, table, hashes, tokens, span, step, draw.dtype)


def _index_keys(run: Run, served: Served, draw: Draw) -> Outputs:
    c, P = of_kind(served.config), 32
    d, size = c.indexer_head_dim, c.indexer_compress_ratio
    T, keys, blocks = sum(ROWS), draw(4, P, d), draw(4, P // size, d)
    positions = torch.cat([torch.arange(n) for n in ROWS])
    q = run(
        draw(T, (c.indexer_n_heads + 1) * d),
        *(draw(d), draw(d), draw(64, c.rotary_dim)),
        *(positions, positions - positions % size, keys, blocks),
        *_sequences(draw, ROWS, ROWS),
        *(size, c.rms_norm_eps),
    )
    yield f"{c.indexer_n_heads} heads of {d}", q
    yield "keys", keys
    yield "keys of blocks", blocks


def _select_blocks(run: Run, served: Served, draw: Draw) -> Outputs:
    """Scores far from each other, so that rounding chooses no other block."""
    c = of_kind(served.config)
    d, size, P = c.indexer_head_dim, c.indexer_compress_ratio, 32
    order = torch.randperm(P // size, generator=draw.chance).to(draw.dtype) + 1
    blocks = (order[:, None] * torch.ones(d, dtype=draw.dtype)).expand(4, -1, -1).contiguous()
    q = torch.ones(2, c.indexer_n_heads, d, dtype=draw.dtype)
    sequences = _sequences(draw, (1, 1), (P, P - 1))
    chosen, tail = run(q, blocks, *sequences, size, max(1, P // size - 2))
    yield "blocks", chosen.float()
    yield "tails", tail.float()


def _sequences(
    draw: Draw, lengths: tuple[int, ...], seq_lens: tuple[int, ...]
) -> tuple[torch.Tensor, ...]:
    """Rows of one page each, of four."""
    starts = [0, *accumulate(lengths)]
    rows = [*range(len(lengths))]
    return (
        draw.tensor([3, 1]).view(2, 1),
        *map(draw.tensor, (rows, starts, [*seq_lens])),
    )
