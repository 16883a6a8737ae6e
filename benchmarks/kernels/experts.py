"""The block model's 64 experts against upstream's bf16 kernels, AMX for packed ones."""

from collections.abc import Callable, Iterator

import torch
import vllm._custom_ops as upstream
from torch import Tensor

from benchmarks.kernels.timing import Case, record
from benchmarks.report import Record, Run
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import (
    PackedWeight,
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    stack,
    unpack,
)

E, INNER, TOPK, HIDDEN, DTYPE = 64, 512, 10, 2048, torch.bfloat16

Make = Callable[[int, int], PackedWeight]  # rows, columns


def measure(run: Run) -> Iterator[Record]:
    yield record(run, "experts", "How fast are the experts?", cases)


def cases() -> Iterator[Case]:
    """Every case; upstream's kernel gets weights of the same values, packed in its way."""
    w13 = torch.empty(E, 2 * INNER, HIDDEN, dtype=DTYPE).normal_(std=0.02)
    w2 = torch.empty(E, HIDDEN, INNER, dtype=DTYPE).normal_(std=0.02)
    yield from of_weights("", w13, w2, w13, w2, isa="vec")
    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    yield from of_weights("packed, ", pack_bf16(w13), pack_bf16(w2), w13, w2, isa=isa)
    del w13, w2
    makes: dict[str, Make] = {"int8, ": int8, "int4, ": int4, "fp8, ": fp8}
    for name, make in makes.items():
        w13 = stack((make(2 * INNER, HIDDEN) for _ in range(E)), E)
        w2 = stack((make(HIDDEN, INNER) for _ in range(E)), E)
        yield from of_weights(name, w13, w2, unpack(w13).to(DTYPE), unpack(w2).to(DTYPE), isa=isa)


def of_weights(
    kind: str,
    w13: Tensor | PackedWeight,
    w2: Tensor | PackedWeight,
    plain13: Tensor,
    plain2: Tensor,
    *,
    isa: str,
) -> Iterator[Case]:
    packed13, packed2 = (upstream.cpu_prepack_moe_weight(w, isa) for w in (plain13, plain2))
    for tokens in (1, 8, 1024):
        x = torch.randn(tokens, HIDDEN).to(DTYPE)
        weights, ids = torch.randn(tokens, E).softmax(-1).topk(TOPK)
        routed = {"topk_weights": weights, "topk_ids": ids.int()}

        def plugin(x=x, routed=routed) -> Tensor:
            return fused_moe(x=x, w13=w13, w2=w2, **routed)

        def theirs(x=x, routed=routed) -> Tensor:
            out = torch.empty_like(x)
            upstream.cpu_fused_moe(
                out, x, packed13, packed2, None, None, *routed.values(), "silu", isa, False
            )
            return out

        name = f"{kind}{tokens:,} token{'s'[: tokens > 1]}"
        yield Case(name, plugin, theirs)


def int8(rows: int, columns: int) -> PackedWeight:
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    return pack_int8(values, torch.full((rows, 1), 3e-4))


def int4(rows: int, columns: int) -> PackedWeight:
    values = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
    return pack_int4(values, torch.full((rows, columns // 128), 5e-3, dtype=DTYPE))


def fp8(rows: int, columns: int) -> PackedWeight:
    values = (torch.randn(rows, columns) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return pack_fp8(values, torch.full((rows // 128, columns // 128), 2e-4))
