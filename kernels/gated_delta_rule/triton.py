"""A linear-attention layer in Triton: which kernels a step launches.

Two for decode and verify, five with prefill rows, seven if a row is split.
"""

import torch
from torch import Tensor
from triton import next_power_of_2

from qwen3next_plugin.kernels.gated_delta_rule.arguments import (
    RuleInputs,
    RuleWeights,
    check_arguments,
)
from qwen3next_plugin.kernels.gated_delta_rule.commit import commit
from qwen3next_plugin.kernels.gated_delta_rule.long_rows import chunk_matrices, prepare
from qwen3next_plugin.kernels.gated_delta_rule.operands import (
    Chunks,
    Inputs,
    Norm,
    Pages,
    inputs,
    no_convolution,
    no_norm,
    pages,
)
from qwen3next_plugin.kernels.gated_delta_rule.scan import (
    chunk_scan,
    segment_starts,
    segment_transitions,
)
from qwen3next_plugin.kernels.gated_delta_rule.short_rows import short_rows
from qwen3next_plugin.kernels.gpu import faults
from qwen3next_plugin.kernels.gpu.configs import Config, config_for
from qwen3next_plugin.kernels.gpu.convolution import Convolution
from qwen3next_plugin.kernels.gpu.rows import StepTensors, most_chunks, step_tensors
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID, Step

MIN_DOT = 16  # smallest dim of tl.dot


def run(x: RuleInputs, weights: RuleWeights, pool: StatePool, step: Step) -> Tensor:
    """Shapes as in the public op. Of a bad row the output is NaN, and `faults.check` raises."""
    check_arguments(x, weights, pool, step)
    H = x.q.shape[1]
    out = torch.empty_like(x.v, memory_format=torch.contiguous_format)
    run_layer(
        x=inputs(x.q, x.k, x.v.unflatten(1, (H, -1)), x.a, x.b, *weights),
        conv=None,
        norm=None,
        pages=pages(pool),
        step=step_tensors(step, pool.span),
        max_query_len=step.max_query_len,
        out_=out,
    )
    return faults.checked(out)


def run_layer(
    *,
    x: Inputs,
    conv: Convolution | None,
    norm: Norm | None,
    sigmoid_gate: bool = False,
    pages: Pages,
    step: StepTensors,
    max_query_len: int,
    out_: Tensor,
) -> None:
    """Run the layer on its pages; see the public op `gated_delta_net` for what it computes.

    Without conv, q, k and v are used as they are. Without norm, out_ is the output of the
    recurrence. No row with a page has more than max_query_len tokens.

    Shapes: out_ [T, HV, V] or [T, HV * V], contiguous
    """
    (T, H, K), (_, _, R, V), W = x.q.shape, x.v.shape, pages.key.shape[1]
    N, HV, slots, device = len(step.slot), H * R, len(step.span), x.q.device
    config = config_for(device)
    raw = out_.view(T, HV, V) if norm is None else x.v.new_empty(T, HV, V)
    keys = x.q.new_empty(T, H, K, dtype=torch.float32)
    row_faults = step.slot.new_empty(N)
    sizes = {"H": H, "R": R, "K": K, "V": V, "W": W}
    convolves = {"CONVOLVES": conv is not None}
    conv = conv or no_convolution(x)
    if N == 0:
        out_.zero_()
        return

    BK, BV = max(MIN_DOT, next_power_of_2(K)), min(config.short_columns, next_power_of_2(V))
    short_rows[-(-V // BV) * HV, N](
        x, conv, step, row_faults, faults.record(device), pages, keys, raw, T, slots,
        **sizes, **convolves, BK=BK, BV=BV, STAGES=config.replay_stages, **config.short.options(),
    )  # fmt: skip
    if max_query_len > W - GRID + 1:
        chunks = _chunks(x, conv, step, keys, raw, config, sizes, convolves)
        _scan(chunks, pages, step, max_query_len, raw, config, sizes)
    commit[T + N, H](
        x, conv, norm or no_norm(x), step, row_faults, pages, keys, raw, out_, T, N,
        **sizes, **convolves, NORMS=norm is not None, SIGMOID=sigmoid_gate,
        BK=BK, BV=next_power_of_2(V), BR=next_power_of_2(R), **config.commit.options(),
    )  # fmt: skip


def _chunks(
    x: Inputs,
    conv: Convolution,
    step: StepTensors,
    keys: Tensor,
    raw: Tensor,
    config: Config,
    sizes: dict[str, int],
    convolves: dict[str, bool],
) -> Chunks:
    """Prepare the rows longer than any draft for the scan; writes their last keys to `keys`."""
    (T, HV, V), H, R, K, W = raw.shape, *(sizes[name] for name in "HRKW")
    N, slots, C = len(step.slot), len(step.span), config.chunk
    BK, BV = max(MIN_DOT, next_power_of_2(K)), max(MIN_DOT, next_power_of_2(V))
    chunks = most_chunks(T, N, W - GRID + 2, C)
    q, k, v = raw.new_empty(T, H, K), raw.new_empty(T, H, K), raw.new_empty(T, HV, V)
    g, beta = (raw.new_empty(T, HV, dtype=torch.float32) for _ in range(2))
    inverse, attention = raw.new_empty(T, HV, C), raw.new_empty(T, HV, C)
    prepare[chunks * C // config.prepare_tokens, H](
        x, conv, step, q, k, v, g, beta, keys, T, N, slots,
        **sizes, **convolves, CHUNK=C, BT=config.prepare_tokens,
        BK=BK, BV=BV, BR=next_power_of_2(R), **config.prepare.options(),
    )  # fmt: skip
    precision = config.fp32_precision  # has no effect on 16-bit operands
    exact = raw.dtype == torch.float32
    chunk_matrices[chunks, HV](
        q, k, g, beta, step, inverse, attention, T, N, slots,
        H=H, R=R, K=K, W=W, C=C, BK=BK, PRECISION=precision,
        INVERSE_PRECISION=precision if exact else config.inverse_precision,
        **config.matrices.options(),
    )  # fmt: skip
    return Chunks(q, k, v, g, inverse, attention)


def _scan(
    chunks: Chunks,
    pages: Pages,
    step: StepTensors,
    max_query_len: int,
    raw: Tensor,
    config: Config,
    sizes: dict[str, int],
) -> None:
    """Outputs, S and u of the long rows; the longest are split if the layer has few heads."""
    (T, HV, V), K, N, slots = raw.shape, sizes["K"], len(step.slot), len(step.span)
    BK = max(MIN_DOT, next_power_of_2(K))
    BV = max(MIN_DOT, min(config.scan_columns, next_power_of_2(V)))
    V_tiles, K_tiles = -(-V // BV), -(-K // BV)
    splits = config.splits(HV, K, V)
    is_split = splits and max_query_len >= config.split_from
    segments = most_chunks(T, N, config.split_from, config.segment) if is_split else 0
    starts = raw.new_empty(segments, HV, K, V, dtype=torch.float32)
    walks: dict[str, int | str] = {**sizes, "BK": BK, "BV": BV}
    walks |= {"SEGMENT": config.segment, "SPLIT_FROM": config.split_from}
    walks["PRECISION"] = config.fp32_precision
    if is_split:
        tiles = V_tiles + K_tiles
        transitions = raw.new_empty(segments, HV, K, tiles * BV, dtype=torch.float32)
        segment_transitions[tiles * HV, segments](
            chunks, step, transitions, T, N, slots,
            **walks, C=config.chunk, **config.transitions.options(),
        )  # fmt: skip
        # Narrow tiles, because each program holds a whole [K, K] of a segment.
        segment_starts[-(-V // MIN_DOT) * HV, segments](
            transitions, starts, step, pages, T, N, slots,
            **walks | {"BV": MIN_DOT}, COLUMNS=BV, **config.starts.options(),
        )  # fmt: skip
    chunk_scan[V_tiles * HV, N + segments](
        chunks, starts, step, pages, raw, T, N, slots,
        **walks, C=config.chunk, SPLITS=splits, **config.scan.options(),
    )  # fmt: skip
