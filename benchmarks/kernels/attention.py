"""Full attention over the pool of keys and values, and a read at the speed of the memory."""

import itertools
import statistics
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels.inputs import DRAFT, DTYPE, int32
from benchmarks.kernels.timing import PAIRS, Case, record, seconds
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels.paged_attention import paged_attention

HQ, HKV, D, CONTEXT = 16, 2, 256, 16_384


def measure(run: Run) -> Iterator[Record]:
    """Decode, verify and prefill against torch's; decode against a read."""
    yield record(run, "attention", "How fast is full attention, compared with torch's?", cases)
    yield run.record(
        "kernels/attention_bandwidth",
        "How fast is attention, compared with a read?",
        f"context of {CONTEXT:,}",
        {"keys and values": "MB", "decode": "µs", "decode / reading them": ""},
        {"decode": over_bandwidth()},
    )


def cases() -> Iterator[Case]:
    """Every case, with random keys and values."""
    yield attention(f"decode at {CONTEXT:,}", CONTEXT, 1)
    yield attention(f"verify {DRAFT} drafts at {CONTEXT:,}", CONTEXT, 1 + DRAFT)
    for tokens in (1024, 4096):
        yield attention(f"prefill {tokens:,}", tokens, tokens)


def attention(name: str, context: int, queries: int, layers: int = 4) -> Case:
    """Attention over the pool, against torch's over keys and values that are already gathered.

    Enough layers take turns that none is in the cache. Slots are in order, as for one long prompt.
    """
    pools = torch.empty(layers, 2, context + 1, HKV, D, dtype=DTYPE).normal_()
    q = torch.empty(queries, HQ, D, dtype=DTYPE).normal_()
    ours, theirs = itertools.cycle(pools), itertools.cycle(pools[:, :, 1:].transpose(2, 3))
    step = {
        "token_table": torch.arange(1, context + 1, dtype=torch.int32)[None],
        "table_row": torch.tensor([0]), "query_start_loc": int32(0, queries),
        "seq_lens": torch.tensor([context]), "scale": D**-0.5,
    }  # fmt: skip
    last = torch.ones(queries, context, dtype=torch.bool).tril(context - queries)
    masked = {"is_causal": True} if queries == context else {"attn_mask": last}

    def plugin() -> Tensor:
        key_cache, value_cache = next(ours)
        return paged_attention(q=q, key_cache=key_cache, value_cache=value_cache, **step)

    def torchs() -> Tensor:
        k, v = next(theirs)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k[None], v[None], enable_gqa=True, **masked
        )
        return out[0].transpose(0, 1)

    calls = layers if queries < context else 1
    return Case(name, plugin, torchs, calls)


def over_bandwidth() -> dict[str, float]:
    """A decode step's time, and its ratio to reading its keys and values as one large read."""
    case = attention("", CONTEXT, 1)
    large = torch.ones(2**25, dtype=torch.int64)
    moved, ours, ratios = 2 * CONTEXT * HKV * D * DTYPE.itemsize, [], []
    for _ in range(PAIRS):
        ours.append(seconds(case.plugin, case.calls))
        ratios.append(ours[-1] / (seconds(large.sum, 1) * moved / large.nbytes))
    return {
        "keys and values": moved / 1e6,
        "decode": statistics.median(ours) * 1e6,
        "decode / reading them": statistics.median(ratios),
    }
