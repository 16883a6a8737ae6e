"""The kernels against the operators that upstream's CPU layers call.

    python -m benchmarks.kernels [out.json]

Real shapes, bf16. Upstream and plugin alternate, a round over all pages each, so that neither
finds its state in the nearest cache; both must agree before anything is timed.
"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import vllm._custom_ops as upstream
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.layers.mamba.ops.cpu import gdn_attention
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.platforms import current_platform

from benchmarks.report import Table, markdown
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.draft_head import draft_head, quantise_rows
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule
from qwen3next_plugin.kernels.paged_attention import paged_attention
from qwen3next_plugin.kernels.step import GRID

H, HV, K, V, DTYPE = 16, 32, 128, 128, torch.bfloat16
R = HV // H * V
C = H * (2 * K + R)
DRAFT = 3  # tokens a verify checks beside the one that is sure
ACCEPTED = 2  # of them, in every verify
PAGES = 32  # that rotate: 67 MB of state
TOLERANCE = 2e-2  # of upstream and plugin against each other, both bf16
PAIRS = 30
VOCABULARY, HIDDEN, KEPT = 151_936, 2048, 32_768  # KEPT: rows of a head over part of it
HQ, HKV, D, CONTEXT = 16, 2, 256, 16_384  # full attention, and a long context of it

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """One question: the two ways to run it, and how many calls go once round the pages."""

    name: str
    plugin: Call
    upstream: Call
    calls: int = 1


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def measure(pairs: int = PAIRS) -> Table:
    """Times of every case, alternating. Raises AssertionError on the first red check."""
    current_platform.import_kernels()
    torch.manual_seed(0)
    table: Table = {case.name: timed(case, pairs) for case in cases()}
    table["decode, MB moved per token, by count"] = bytes_per_token()
    return table | {f"attention, decode at {CONTEXT:,}, its bytes": over_bandwidth(pairs)}


def cases() -> Iterator[Case]:
    """Every case, with fresh states."""
    for batch in (1, 8):
        yield recurrence(f"decode, batch {batch}", batch, 1)
        yield recurrence(f"verify {DRAFT} drafts, batch {batch}", batch, 1 + DRAFT)
        yield convolution(f"convolution, decode, batch {batch}", batch, 1)
        yield convolution(f"convolution, verify, batch {batch}", batch, 1 + DRAFT)
    for tokens in (1024, 4096):
        yield prefill(f"prefill {tokens}", tokens)
        yield long_convolution(f"convolution, prefill {tokens}", tokens)
    yield recurrence("decode, S written once in 8, over every token, batch 16", 16, 1)
    yield verify_layer(f"convolution and recurrence, verify {DRAFT} drafts, batch 8", 8)
    yield from output_heads()
    yield from experts()
    yield attention(f"attention, decode at {CONTEXT:,}", CONTEXT, 1)
    yield attention(f"attention, verify {DRAFT} drafts at {CONTEXT:,}", CONTEXT, 1 + DRAFT)
    for tokens in (1024, 4096):
        yield attention(f"attention, prefill {tokens}", tokens, tokens)


def timed(case: Case, pairs: int) -> dict[str, float]:
    """Check while warming up, then time pairs; the ratio is the median of the pairs' own."""
    for _ in range(2 * case.calls):  # so that every page has a past
        error = relative_error(case.plugin(), case.upstream())
        if not error <= TOLERANCE:
            raise AssertionError(f"{case.name}: plugin and upstream differ by {error:.1e}")
    ours, theirs = [], []
    for _ in range(pairs):
        ours.append(seconds(case.plugin, case.calls))
        theirs.append(seconds(case.upstream, case.calls))
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "upstream µs": statistics.median(theirs) * 1e6,
        "plugin µs": statistics.median(ours) * 1e6,
        "ratio": statistics.median(ratios),
    }


def seconds(call: Call, calls: int) -> float:
    """Of one call, within a round of them: in an engine, too, one layer follows the other."""
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def relative_error(out: Tensor, ref: Tensor) -> float:
    out, ref = out.double().flatten(), ref.double().flatten()
    return ((out - ref).norm() / ref.norm()).item()


def layer_inputs(tokens: int) -> dict[str, Tensor]:
    """What a layer projects: q, k, v, b, a as views of two grouped projections."""
    qkvz = torch.randn(tokens, H, 2 * K + 2 * R).to(DTYPE)
    q, k, v, _ = qkvz.split([K, K, R, R], dim=-1)
    b, a = torch.randn(tokens, H, 2 * (HV // H)).to(DTYPE).chunk(2, dim=-1)
    return {"q": q, "k": k, "v": v, "a": a, "b": b}


def parameters() -> tuple[Tensor, Tensor]:
    """A_log fp32, dt_bias in the activations' dtype, as upstream wants them."""
    return torch.empty(HV).uniform_(1, 16).log(), torch.randn(HV).to(DTYPE)


class Pages:
    """The plugin's pages, and the steps that walk over them."""

    def __init__(self, draft_tokens: int):
        window = GRID + draft_tokens
        self.state_ = torch.zeros(PAGES, HV, K, V)
        self.key_ = torch.zeros(PAGES, window, H, K)
        self.u_ = torch.zeros(PAGES, window, HV, V)
        self.g_ = torch.zeros(PAGES, window, HV)
        self.span_ = torch.zeros(PAGES, 2, dtype=torch.int32)
        self.conv_ = torch.zeros(PAGES, 4 + draft_tokens, C, dtype=DTYPE)

    def recurrent(self) -> dict[str, Tensor]:
        names = ("state_", "key_", "u_", "g_", "span_")
        return {name: getattr(self, name) for name in names}


def every_slot(batch: int) -> tuple[Tensor, ...]:
    """All pages, as many at a time as one call takes."""
    return torch.arange(PAGES, dtype=torch.int32).split(batch)


def slots_in_turn(batch: int) -> Iterator[Tensor]:
    """The pages of one call after the other."""
    return itertools.cycle(every_slot(batch))


def turns(batch: int, advance: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(slots, context lengths) of one call after the other."""
    for round_ in itertools.count():
        context_len = torch.full((batch,), round_ * advance, dtype=torch.int32)
        for slots in every_slot(batch):
            yield slots, context_len


def spans_in_turn(batch: int, n: int, advance: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(slots, context lengths, spans) of one call after the other, round and round the ring.

    The recurrence would advance the spans.
    """
    ring, rounds = 3 + n, []
    for i in range(ring):
        c = ring + i * advance % ring
        span = int32(c - advance, c - advance + n).expand(PAGES, 2).contiguous()
        rounds.append((torch.full((batch,), c, dtype=torch.int32), span))
    for context_len, span in itertools.cycle(rounds):
        for slots in every_slot(batch):
            yield slots, context_len, span


def recurrence(name: str, batch: int, n: int) -> Case:
    x, (A_log, dt_bias), pages = layer_inputs(batch * n), parameters(), Pages(n - 1)
    x = {**x, "v": x["v"].reshape(-1, HV, V)}
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    q, k, v = (x[name].contiguous() for name in "qkv")
    a, b = x["a"].flatten(1), x["b"].flatten(1)
    advance = 1 if n == 1 else 1 + ACCEPTED
    ours = turns(batch, advance)

    def plugin() -> Tensor:
        slot, context_len = next(ours)
        return gated_delta_rule(
            **x, A_log=A_log, dt_bias=dt_bias, **pages.recurrent(),
            query_start_loc=starts, slot=slot, context_len=context_len,
        )  # fmt: skip

    states = torch.zeros(PAGES * n, HV, K, V)
    slots = slots_in_turn(batch)
    shared = {"A_log": A_log, "dt_bias": dt_bias, "cu_seqlens": starts}

    def decode() -> Tensor:
        return upstream.fused_sigmoid_gating_delta_rule_update_cpu(
            q=q[None], k=k[None], v=v[None], a=a, b=b, **shared, initial_state_source=states,
            initial_state_indices=next(slots), use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    accepted = torch.full((batch,), advance, dtype=torch.int32)
    columns = torch.arange(n, dtype=torch.int32)
    tables = itertools.cycle([page[:, None] * n + columns for page in every_slot(batch)])

    def verify() -> Tensor:
        return upstream.fused_sigmoid_gating_delta_rule_update_spec_cpu(
            q=q, k=k, v=v, a=a, b=b, **shared, initial_state_source=states,
            spec_state_indices=next(tables), num_accepted_tokens=accepted,
            use_qk_l2norm_in_kernel=True,
        )  # fmt: skip

    # so many rounds that S has been written as often as it ever is
    return Case(name, plugin, decode if n == 1 else verify, calls=GRID * PAGES // batch)


def bytes_per_token() -> dict[str, float]:
    """What a decoded token reads and writes of its page, in MB: S every token, or once in GRID.

    Of the window a token reads what came since S was written, GRID tokens where it writes S, and
    adds its own key, corrected value and decay.
    """
    S, entry = 4 * HV * K * V, 4 * (H * K + HV * V + HV)
    window = S + S / GRID + entry * (sum(range(1, GRID + 1)) / GRID + 1)
    row = {"S every token, MB": 2 * S / 1e6, "S once in 8, MB": window / 1e6}
    return row | {"window over every token": window / (2 * S)}


def verify_layer(name: str, batch: int) -> Case:
    """As upstream's layer verifies where there is no AMX: the convolution a sequence at a time."""
    n = 1 + DRAFT
    x, (A_log, dt_bias), pages = layer_inputs(batch * n), parameters(), Pages(DRAFT)
    weight = torch.randn(C, 4).to(DTYPE)
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    b, a = x["b"].flatten(1), x["a"].flatten(1)
    advance = 1 + ACCEPTED
    ours = turns(batch, advance)

    def plugin() -> Tensor:
        slot, context_len = next(ours)
        step = {"query_start_loc": starts, "slot": slot, "context_len": context_len}
        q, k, v = causal_conv1d(
            q=x["q"], k=x["k"], v=x["v"], weight=weight, conv_=pages.conv_, span=pages.span_, **step
        )
        return gated_delta_rule(
            q=q, k=k, v=v.view(-1, HV, V), a=x["a"], b=x["b"], A_log=A_log, dt_bias=dt_bias,
            **pages.recurrent(), **step,
        )  # fmt: skip

    def rearrange(mixed_qkv: Tensor) -> tuple[Tensor, ...]:
        q, k, v = mixed_qkv.split([H * K, H * K, HV * V], dim=-1)
        return q.view(1, -1, H, K), k.view(1, -1, H, K), v.view(1, -1, HV, V)

    layer = SimpleNamespace(
        conv1d=SimpleNamespace(weight=weight, bias=None), activation="silu",
        rearrange_mixed_qkv=rearrange, A_log=A_log, dt_bias=dt_bias,
    )  # fmt: skip
    states = torch.zeros(PAGES * n, HV, K, V)
    inputs = torch.zeros(PAGES * n, C, 3 + DRAFT, dtype=DTYPE)
    accepted = torch.full((batch,), advance, dtype=torch.int32)
    columns = torch.arange(n, dtype=torch.int32)
    tables = itertools.cycle([page[:, None] * n + columns for page in every_slot(batch)])

    def upstreams() -> Tensor:
        metadata = SimpleNamespace(
            num_spec_decodes=batch, spec_state_indices_tensor=next(tables),
            spec_query_start_loc=starts, num_accepted_tokens=accepted,
        )  # fmt: skip
        with patch.object(torch.cpu, "_is_amx_tile_supported", return_value=False):
            return gdn_attention._spec_forward(
                layer, metadata, mixed(x), b, a, inputs, states, 4, 3 + DRAFT
            )

    return Case(name, plugin, upstreams, calls=GRID * PAGES // batch)


def prefill(name: str, tokens: int) -> Case:
    x, (A_log, dt_bias), pages = layer_inputs(tokens), parameters(), Pages(0)
    x = {**x, "v": x["v"].reshape(-1, HV, V)}
    q, k, v = (x[name].contiguous()[None] for name in "qkv")
    a, b = (x[name].flatten(1) for name in "ab")
    starts, fresh, states = int32(0, tokens), int32(0), torch.zeros(PAGES, HV, K, V)
    ours, theirs = slots_in_turn(1), slots_in_turn(1)

    def plugin() -> Tensor:
        return gated_delta_rule(
            **x, A_log=A_log, dt_bias=dt_bias, **pages.recurrent(),
            query_start_loc=starts, slot=next(ours), context_len=fresh,
        )  # fmt: skip

    def chunked() -> Tensor:
        g, beta = upstream.fused_gdn_gating_cpu(A_log=A_log, a=a, b=b, dt_bias=dt_bias)
        slot = next(theirs)
        states[slot] = 0
        return upstream.chunk_gated_delta_rule_cpu(
            query=q, key=k, value=v, g=g, beta=beta, initial_state=states,
            output_final_state=True, cu_seqlens=starts, head_first=False,
            use_qk_l2norm_in_kernel=True, initial_state_indices=slot,
        )[0]  # fmt: skip

    return Case(name, plugin, chunked)


def mixed(x: dict[str, Tensor]) -> Tensor:
    """The contiguous [T, C] that upstream's layer makes of the projection for its convolution."""
    return torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1)


def convolved(x: dict[str, Tensor], weight: Tensor, pages: Pages, **step: Tensor) -> Tensor:
    """The plugin's convolution; its three results are views of one buffer, which is returned."""
    q, _, _ = causal_conv1d(
        q=x["q"], k=x["k"], v=x["v"], weight=weight, conv_=pages.conv_, span=pages.span_, **step
    )
    return q.as_strided((len(q), C), (C, 1))


def convolution(name: str, batch: int, n: int) -> Case:
    x, weight, pages = layer_inputs(batch * n), torch.randn(C, 4).to(DTYPE), Pages(n - 1)
    starts = torch.arange(0, batch * n + 1, n, dtype=torch.int32)
    advance = 1 if n == 1 else 1 + ACCEPTED
    ours, theirs = spans_in_turn(batch, n, advance), slots_in_turn(batch)

    def plugin() -> Tensor:
        slot, context_len, pages.span_ = next(ours)
        return convolved(
            x, weight, pages, query_start_loc=starts, slot=slot, context_len=context_len
        )

    packed = upstream.causal_conv1d_weight_pack(weight)
    states = torch.zeros(PAGES, 3 + n - 1, C, dtype=DTYPE).transpose(1, 2)
    accepted = None if n == 1 else torch.full((batch,), advance, dtype=torch.int32)
    shape = (batch, C) if n == 1 else (batch, n, C)

    def update() -> Tensor:
        return upstream.causal_conv1d_update_cpu(
            x=mixed(x).view(shape), conv_states=states, weight=packed, bias=None,
            silu_activation=True, conv_state_indices=next(theirs), is_weight_packed=True,
            num_accepted_tokens=accepted,
        )  # fmt: skip

    return Case(name, plugin, update, calls=PAGES // batch)


def long_convolution(name: str, tokens: int) -> Case:
    x, weight, pages = layer_inputs(tokens), torch.randn(C, 4).to(DTYPE), Pages(0)
    starts, fresh = int32(0, tokens), int32(0)
    ours, theirs = slots_in_turn(1), slots_in_turn(1)

    def plugin() -> Tensor:
        return convolved(
            x, weight, pages, query_start_loc=starts, slot=next(ours), context_len=fresh
        )

    packed = upstream.causal_conv1d_weight_pack(weight)
    states = torch.zeros(PAGES, 3, C, dtype=DTYPE).transpose(1, 2)
    no_past = torch.tensor([False])

    def forward() -> Tensor:
        return upstream.causal_conv1d_fwd_cpu(
            x=mixed(x).t(), weight=packed, bias=None, conv_states=states, query_start_loc=starts,
            cache_indices=next(theirs), has_initial_state=no_past, silu_activation=True,
            is_weight_packed=True,
        ).t()  # fmt: skip

    return Case(name, plugin, forward)


def output_heads() -> Iterator[Case]:
    """The first-ranked token, of an int8 head and of the bf16 head as upstream packs it.

    The rows kept are the larger ones, so that the whole head's first-ranked row is among them.
    """
    weight = torch.empty(VOCABULARY, HIDDEN, dtype=DTYPE).normal_()
    weight[KEPT:] *= 0.5
    int8, scale = quantise_rows(weight)
    kept, whole = packed(weight[:KEPT].clone()), packed(weight)
    for batch in (1, 8):
        x = torch.randn(batch, HIDDEN).to(DTYPE)
        for rows, name in ((VOCABULARY, "all rows"), (KEPT, f"{KEPT:,} rows")):
            ids = torch.arange(rows, dtype=torch.int32)
            head = {"weight": int8, "scale": scale, "rows": ids}
            yield greedy(f"draft head, {name}, batch {batch}", x, head, whole)
        yield greedy(f"draft head, {name} on both sides, batch {batch}", x, head, kept)


def experts() -> Iterator[Case]:
    """The block model's 64 experts against upstream's portable kernel, which it packs them for."""
    E, inner, k = 64, 512, 10
    w13 = torch.empty(E, 2 * inner, HIDDEN, dtype=DTYPE).normal_(std=0.02)
    w2 = torch.empty(E, HIDDEN, inner, dtype=DTYPE).normal_(std=0.02)
    packed13, packed2 = (upstream.cpu_prepack_moe_weight(w.clone(), "vec") for w in (w13, w2))
    for tokens in (1, 8, 32, 1024):
        x = torch.randn(tokens, HIDDEN).to(DTYPE)
        weights, ids = torch.randn(tokens, E).softmax(-1).topk(k)
        routed = {"topk_weights": weights, "topk_ids": ids.int()}

        def plugin(x=x, routed=routed) -> Tensor:
            return fused_moe(x=x, w13=w13, w2=w2, **routed)

        def portable(x=x, routed=routed) -> Tensor:
            out = torch.empty_like(x)
            upstream.cpu_fused_moe(
                out, x, packed13, packed2, None, None, *routed.values(), "silu", "vec", False
            )
            return out

        yield Case(f"experts, {tokens} tokens", plugin, portable)


def attention(name: str, context: int, queries: int, layers: int = 4) -> Case:
    """Over the pool, against torch's over keys and values that are gathered already.

    As many layers as do not fit the cache. Slots are in order, as for one long prompt.
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

    return Case(name, plugin, torchs, calls=layers if queries < context else 1)


def over_bandwidth(pairs: int) -> dict[str, float]:
    """A decode step's time over that of reading its keys and values at a large read's speed."""
    case = attention("", CONTEXT, 1)
    large = torch.ones(2**25, dtype=torch.int64)
    moved, ours, ratios = 2 * CONTEXT * HKV * D * DTYPE.itemsize, [], []
    for _ in range(pairs):
        ours.append(seconds(case.plugin, case.calls))
        read = seconds(large.sum, 1) * moved / (large.numel() * large.itemsize)
        ratios.append(ours[-1] / read)
    median = statistics.median
    return {"MB": moved / 1e6, "µs": median(ours) * 1e6, "over the bandwidth": median(ratios)}


def packed(weight: Tensor) -> torch.nn.Module:
    """The weight as upstream keeps that of a head."""
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def greedy(name: str, x: Tensor, head: dict[str, Tensor], bf16: torch.nn.Module) -> Case:
    def plugin() -> Tensor:
        return draft_head(x=x, **head)[1]

    def argmax() -> Tensor:
        logits = bf16.cpu_linear(x, bf16.weight, None)
        return logits.gather(1, logits.argmax(-1, keepdim=True))

    return Case(name, plugin, argmax)


if __name__ == "__main__":
    table = measure()
    print(f"instruction set {native.isa()}, {torch.get_num_threads()} threads")
    print(markdown(table))
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(table, indent=2))
