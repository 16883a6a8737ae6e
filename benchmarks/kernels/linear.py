"""Packed linear layers against torch's weight-only kernels; bf16 and FP8 against oneDNN's bf16."""

import itertools
import statistics
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.draft_head import packed
from benchmarks.kernels.peak import peak
from benchmarks.kernels.timing import PAIRS, Call, Case, record, seconds
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels import native
from qwen3next_plugin.kernels.linear import (
    PackedWeight,
    linear,
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    unpack,
)
from qwen3next_plugin.kernels.linear.packed_weight import joined

N, K, DTYPE = 8192, 2048, torch.bfloat16
LAYERS = 4  # weights that calls walk over
GROUP = 128
ROWS = (1, 8, 512)


def measure(run: Run) -> Iterator[Record]:
    """Every format against torch's, one row against a read, many against an instruction alone."""
    yield record(run, "linear", "How fast are packed layers?", cases)
    shape = f"N = {N:,}, K = {K:,}"
    yield run.record(
        "kernels/linear_bandwidth",
        "How fast is a packed layer, compared with a read?",
        f"M = 1, {shape}",
        {"weight": "MB", "layer": "µs", "reading it / layer": ""},
        over_bandwidth(),
    )
    yield run.record(
        "kernels/linear_peak",
        "How fast is a packed layer, compared with its instruction in registers?",
        f"M = {max(ROWS)}, {shape}",
        {"instruction": "", "layer": "10⁹ multiplications/s", "layer / registers": ""},
        over_peak(),
    )


def cases() -> Iterator[Case]:
    """Every format at every number of rows."""
    for name, make in MAKES.items():
        weights, theirs = zip(*(make() for _ in range(LAYERS)), strict=True)
        for M in ROWS:
            x = torch.randn(M, K).to(DTYPE)
            plugin, upstream = walk(weights, linear, x), walk(theirs, lambda x, run: run(x), x)
            yield Case(f"{name}, M = {M}", plugin, upstream, LAYERS)


def walk(weights: tuple, run: Call, x: Tensor) -> Call:
    """Calls with one weight after the other."""
    turns = itertools.cycle(weights)
    return lambda: run(x, next(turns))


def bf16() -> tuple[PackedWeight, Call]:
    values = torch.randn(N, K).to(DTYPE)
    layer = packed(values.clone())
    return pack_bf16(values), lambda x: layer.cpu_linear(x, layer.weight, None)


def int8() -> tuple[PackedWeight, Call]:
    values = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    scale = (torch.rand(N) * 0.01 + 0.01).to(DTYPE)
    return pack_int8(values, scale[:, None]), lambda x: torch.ops.aten._weight_int8pack_mm(
        x, values, scale
    )


def int4() -> tuple[PackedWeight, Call]:
    values = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    scale = (torch.rand(N, K // GROUP) * 0.01 + 0.01).to(DTYPE)
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1)
    scales = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()
    return pack_int4(joined(values), scale), lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(
        x, theirs, GROUP, scales
    )


def fp8() -> tuple[PackedWeight, Call]:
    values = (torch.randn(N, K) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    weight = pack_fp8(values, torch.rand(N // 128, K // 128) * 0.01 + 0.01)
    layer = packed(unpack(weight).to(DTYPE))
    return weight, lambda x: layer.cpu_linear(x, layer.weight, None)


MAKES = {"bf16": bf16, "int8": int8, "int4": int4, "fp8": fp8}
# By level and format: the instruction that multiplies many rows, and how many of its products are
# one of the layer's: 2 where integers of 16 bits are multiplied as two bytes.
BY_TILES = {"bf16": ("tdpbf16ps", 1), "int8": ("tdpbssd", 2)}
BY_VECTORS = {"bf16": ("vdpbf16ps", 1), "int8": ("vpdpwssd", 1), "int4": ("vpdpbusd", 2)}
INSTRUCTIONS = {
    isa: {"fp8": found["bf16"], "int4": found["int8"]} | found
    for isa, found in {"amx": BY_TILES, "avx512bf16": BY_VECTORS}.items()
}


def over_bandwidth() -> dict[str, dict[str, float]]:
    """At M = 1, each format's time, and the share of it that one large read of its bytes takes."""
    large = torch.ones(2**25, dtype=torch.int64)
    x, found = torch.randn(1, K).to(DTYPE), {}
    for name, make in MAKES.items():
        weights = tuple(make()[0] for _ in range(2 * LAYERS))
        call, moved = walk(weights, linear, x), weights[0].nbytes
        seconds(call, len(weights))
        ours, ratios = [], []
        for _ in range(PAIRS):
            ours.append(seconds(call, len(weights)))
            ratios.append(seconds(large.sum, 1) * moved / large.nbytes / ours[-1])
        found[name] = {
            "weight": moved / 1e6,
            "layer": statistics.median(ours) * 1e6,
            "reading it / layer": statistics.median(ratios),
        }
    return found


def over_peak() -> dict[str, dict[str, float | str]]:
    """At M = 512, with AMX and without, multiplications a second against those in registers."""
    x, found, level = torch.randn(max(ROWS), K).to(DTYPE), {}, native.isa()
    try:
        for name, make in MAKES.items():
            call = partial(linear, x, make()[0])
            for isa, instructions in INSTRUCTIONS.items():
                if isa in native.levels():
                    native.set_isa(isa)
                    found[f"{name}, {isa}"] = share_of_peak(call, *instructions[name])
    finally:
        native.set_isa(level)
    return found


def share_of_peak(call: Call, instruction: str, each: int) -> dict[str, float | str]:
    """Rates of a layer of max(ROWS) rows and of the instruction alone, in turn."""
    seconds(call, 1)
    rates, shares = [], []
    for _ in range(PAIRS):
        rates.append(each * max(ROWS) * N * K / seconds(call, 1))
        shares.append(rates[-1] / peak(instruction))
    return {
        "instruction": instruction,
        "layer": statistics.median(rates) / 1e9,
        "layer / registers": statistics.median(shares),
    }
