"""The block model's 64 experts against upstream's portable kernel."""

from collections.abc import Iterator

import torch
import vllm._custom_ops as upstream
from torch import Tensor

from benchmarks.kernels.timing import Case
from qwen3next_plugin.kernels.fused_moe import fused_moe

HIDDEN, DTYPE = 2048, torch.bfloat16


def cases() -> Iterator[Case]:
    """Every case; upstream's kernel gets packed weights."""
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

        name = f"{tokens:,} token{'s'[: tokens > 1]}"
        yield Case(name, plugin, portable, in_quick=tokens < 1024)
