"""Small inputs for every kernel that a model launches; each backend gets the same ones.

A case is called with a backend's `run`, and yields what it computed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.draft_head import quantise_channels
from qwen3next_plugin.kernels.fused_moe import SharedExpert
from qwen3next_plugin.kernels.gated_delta_net import (
    GatedDeltaNetShape,
    GatedDeltaNetWeights,
    Projections,
)
from qwen3next_plugin.kernels.gpu.configs import config_for
from qwen3next_plugin.kernels.linear import (
    pack_bf16,
    pack_fp8,
    pack_int4,
    pack_int8,
    pack_mxfp4,
    pack_nvfp4,
)
from qwen3next_plugin.kernels.step import NULL_SLOT, Step
from qwen3next_plugin.model.attention import AttentionShape
from qwen3next_plugin.model.kinds import kind_of
from qwen3next_plugin.model.state import PageLayout

Run = Callable[..., Any]
Outputs = Iterator[tuple[str, Tensor]]  # what was computed, and the result

PROMPTS = (70, 17, 1, 3)  # tokens of rows; the first has two chunks
ALIGNMENT = 256  # bytes, of a page
TOKENS = 5
GROUP = 128  # columns that share a scale


@dataclass(frozen=True, slots=True)
class Served:
    """What decides which kernels a rank launches, and on which sizes."""

    config: Qwen3NextConfig
    layout: PageLayout
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.activation_dtype

    @property
    def sizes(self) -> dict[str, str]:
        """All sizes that a case depends on."""
        c = self.config
        return {
            "page": str(self.layout),
            "attention": str(AttentionShape.from_config(c)),
            "hidden": str(c.hidden_size),
            "experts": f"{c.num_experts_per_tok} of {c.num_experts}",
            "kind": "" if (kind := kind_of(c)) is None else kind.sizes(c),
        }


class Draw:
    """Random inputs on a device, always the same."""

    def __init__(self, served: Served) -> None:
        self.device, self.dtype = served.device, served.dtype
        self.chance = torch.Generator("cpu").manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, of the activations' dtype unless told otherwise."""
        x = torch.randn(shape, generator=self.chance, dtype=torch.float32, device="cpu")
        return x.to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """Evenly distributed, `high` excluded."""
        x = torch.randint(low, high, shape, generator=self.chance, dtype=torch.int64, device="cpu")
        return x.to(self.device, dtype)

    def tensor(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


Case = Callable[[Run, Served, Draw], Outputs]


def cases(served: Served, backend: str) -> dict[str, Case]:
    """The case of each op that this backend runs for the model."""
    found: dict[str, Case] = {
        "copy_pages": _copy_pages,
        "gated_delta_net": _gated_delta_net,
        "output_gate": _output_gate,
        "qk_norm_rope": _qk_norm_rope,
        "rms_norm": _rms_norm,
    }
    if served.config.num_experts:
        found["router"] = _router
        if served.config.shared_expert_intermediate_size:
            found["shared_expert_gate"] = _shared_expert_gate
    if backend == "cpu":
        found |= {"linear": _linear, "paged_attention": _paged_attention}
        found["silu_and_mul"] = _silu_and_mul
        if served.config.num_experts:
            found["fused_moe"] = _fused_moe
        if served.layout.num_drafts:
            found["draft_head"] = _draft_head
    return found


class LinearLayer:
    """A linear layer of the model's sizes with random weights, and a page for each row."""

    def __init__(self, run: Run, served: Served, draw: Draw, num_rows: int) -> None:
        s = served.layout
        H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
        self.run, self.draw, self.num_rows = run, draw, num_rows
        self.shape = GatedDeltaNetShape(H, HV, K, V, served.config.layout)
        size = -(-s.page_bytes // ALIGNMENT) * ALIGNMENT
        pages = torch.zeros(num_rows, size, dtype=torch.int8, device=served.device)
        self.pool = s.view(pages)
        fp32 = torch.float32
        self.weights = GatedDeltaNetWeights(
            conv=draw(s.conv_dim, 4) / 2,
            A_log=draw(HV, dtype=fp32).abs(),
            dt_bias=draw(HV, dtype=fp32) - 4,  # slow decay
            norm=draw(V).abs() + 0.5,
            norm_eps=served.config.rms_norm_eps,
            sigmoid_gate=served.config.sigmoid_gate,
        )

    def step(self, lengths: list[int], context_len: list[int], slot: list[int]) -> Tensor:
        """The output of so many tokens in each row. Shapes: returns [T, HV · V]."""
        s, T = self.shape, sum(lengths)
        H, HV, K, V = s.num_key_heads, s.num_value_heads, s.key_dim, s.value_dim
        starts = [0, *accumulate(lengths)]
        qkvz, ba = self.draw(T, 2 * (H * K + HV * V)), self.draw(T, 2 * HV)
        out = qkvz.new_full((T, HV * V), torch.nan)
        self.run(
            Projections(qkvz, ba, s),
            self.weights,
            self.pool,
            Step(
                query_start_loc=self.draw.tensor(starts),
                slot=self.draw.tensor(slot),
                context_len=self.draw.tensor(context_len),
                num_tokens=T,
                max_query_len=max(lengths),
            ),
            out,
        )
        return out


def _gated_delta_net(run: Run, served: Served, draw: Draw) -> Outputs:
    """Prompts, drafts of which some are rejected, and single tokens beside a padding row."""
    prompts = [*PROMPTS, *_split_row(served)]
    N, n = len(prompts), served.layout.num_drafts + 1
    layer, slot, context_len = LinearLayer(run, served, draw, N), [*range(N)], [0] * N
    for what, lengths, committed in (
        ("prompts", prompts, prompts),
        ("drafts", [n] * N, [1 + i % n for i in range(N)]),
        ("drafts after rejected ones", [n] * N, [1] * N),
    ):
        yield f"{what}, rows of {lengths} tokens", layer.step(lengths, context_len, slot)
        context_len = [c + new for c, new in zip(context_len, committed, strict=True)]
    out = layer.step([1] * (N + 1), [*context_len, 0], [*slot, NULL_SLOT])
    yield f"single tokens, {N} rows", out[:-1]
    yield "padding", out[-1:]


def _split_row(served: Served) -> list[int]:
    """The tokens of a row that this GPU splits into segments, if it splits any."""
    if served.device.type != "cuda":
        return []
    gpu, s = config_for(served.device), served.layout
    splits = gpu.splits(s.num_value_heads, s.key_dim, s.value_dim)
    return [gpu.split_from + 1] if splits else []


def run_bad_row(run: Run, served: Served, draw: Draw) -> None:
    """A step whose only row has a slot that is not there: an error must name the row."""
    LinearLayer(run, served, draw, 1).step([1], [0], [7])


def _copy_pages(run: Run, served: Served, draw: Draw) -> Outputs:
    pages = draw.integers(0, 256, 2, 6, 8 * 1025, dtype=torch.uint8)
    mask = draw.tensor([True, False, True], torch.bool)
    run(pages, draw.tensor([0, 1, 5]), draw.tensor([3, 4, 2], torch.int64), mask)
    yield "two of three pages", pages


def _rms_norm(run: Run, served: Served, draw: Draw) -> Outputs:
    D, eps = served.config.hidden_size, served.config.rms_norm_eps
    x, weight, residual = draw(TOKENS, D), draw(D), draw(TOKENS, D)
    yield f"{D} columns", run(x, weight, eps, None)
    yield f"{D} columns, with a residual", run(x, weight, eps, residual)
    yield "the residual", residual


def _qk_norm_rope(run: Run, served: Served, draw: Draw) -> Outputs:
    s, eps = AttentionShape.from_config(served.config), served.config.rms_norm_eps
    heads = (s.num_heads, s.num_kv_heads, s.head_dim, s.rotary_dim)
    qkv = draw(TOKENS, 2 * (s.num_heads + s.num_kv_heads) * s.head_dim)
    cos_sin, positions = draw(128, s.rotary_dim), draw.integers(0, 128, TOKENS, dtype=torch.int64)
    q, k = run(qkv, draw(s.head_dim), draw(s.head_dim), cos_sin, positions, *heads, eps)
    yield f"queries, {heads} heads and dims", q
    yield f"keys, {heads} heads and dims", k


def _output_gate(run: Run, served: Served, draw: Draw) -> Outputs:
    s = AttentionShape.from_config(served.config)
    x, gates = draw(TOKENS, s.num_heads, s.head_dim), draw(TOKENS, s.num_heads, 2, s.head_dim)
    run(x, gates[:, :, 1])
    yield f"{s.num_heads} heads of {s.head_dim}", x


def _router(run: Run, served: Served, draw: Draw) -> Outputs:
    E, k = served.config.num_experts, served.config.num_experts_per_tok
    weights, experts = run(draw(TOKENS, E), k, served.config.norm_topk_prob)
    yield f"weights of {k} of {E} experts", weights
    yield f"choice of {k} of {E} experts", experts


def _shared_expert_gate(run: Run, served: Served, draw: Draw) -> Outputs:
    D = served.config.hidden_size
    x, weight, shared, routed = (
        draw(TOKENS, D),
        draw(1, D) / D**0.5,
        draw(TOKENS, D),
        draw(TOKENS, D),
    )
    run(x, weight, shared, routed)
    yield f"{D} columns", shared


def _silu_and_mul(run: Run, served: Served, draw: Draw) -> Outputs:
    yield "48 columns", run(draw(TOKENS, 96))


def _linear(run: Run, served: Served, draw: Draw) -> Outputs:
    N, K = 48, 2 * GROUP
    scale = draw(N, K // GROUP, dtype=torch.float32).abs()
    values = draw(N, K, dtype=torch.bfloat16)
    weights = (
        pack_bf16(values),
        pack_int8(draw.integers(-127, 128, N, K, dtype=torch.int8), scale),
        pack_int4(draw.integers(0, 256, N, K // 2, dtype=torch.uint8), scale),
        pack_fp8(values.to(torch.float8_e4m3fn), scale),
        pack_nvfp4(
            draw.integers(0, 256, N, K // 2, dtype=torch.uint8),
            draw(N, K // 16, dtype=torch.float32).abs().to(torch.float8_e4m3fn),
            scale[:, :1],
        ),
        pack_mxfp4(
            draw.integers(0, 256, N, K // 2, dtype=torch.uint8),
            draw.integers(120, 125, N, K // 32, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        ),
    )
    for M in (1, 20):
        x = draw(M, K)
        for weight in weights:
            yield f"{M} tokens, {weight.encoding}", run(x, weight, x.dtype)


def _fused_moe(run: Run, served: Served, draw: Draw) -> Outputs:
    E, D, I, k = 4, GROUP, 32, 2  # noqa: E741, the field's letter
    w13, w2 = draw(E, 2 * I, D) / D**0.5, draw(E, D, I) / I**0.5
    packed = [
        pack_int8(
            draw.integers(-127, 128, *w.shape, dtype=torch.int8),
            draw(*w.shape[:2], 1, dtype=torch.float32).abs() / 500,
        )
        for w in (w13, w2)
    ]
    shared = SharedExpert(
        pack_bf16(draw(2 * I, D, dtype=torch.bfloat16) / D**0.5),
        pack_bf16(draw(D, I, dtype=torch.bfloat16) / I**0.5),
        draw(1, D) / D**0.5,
    )
    for T in (1, 20):
        x, topk_weights = draw(T, D), draw(T, k, dtype=torch.float32).abs()
        topk_ids = draw.integers(0, E, T, k, dtype=torch.int32)
        yield f"{T} tokens", run(x, w13, w2, topk_weights, topk_ids)
        yield f"{T} tokens, int8", run(x, *packed, topk_weights, topk_ids, shared)


def _paged_attention(run: Run, served: Served, draw: Draw) -> Outputs:
    s, lengths, seq_lens = AttentionShape.from_config(served.config), [1, 3, 17], [9, 20, 17]
    pages, N = 64, len(lengths)
    keys, values = draw(pages, s.num_kv_heads, s.head_dim), draw(pages, s.num_kv_heads, s.head_dim)
    order = torch.randperm(pages, generator=draw.chance, device="cpu").int()
    starts = draw.tensor([0, *accumulate(lengths)])
    q, rows = draw(sum(lengths), s.num_heads, s.head_dim), draw.tensor([*range(N)])
    table = order[: N * 20].view(N, 20).to(served.device)
    scale = s.head_dim**-0.5
    out = run(q, keys, values, table, rows, starts, draw.tensor(seq_lens), scale, None)
    yield f"{s.num_heads} heads of {s.head_dim}", out


def _draft_head(run: Run, served: Served, draw: Draw) -> Outputs:
    weight, scale = quantise_channels(draw(64, served.config.hidden_size))
    tokens, values = run(
        draw(3, served.config.hidden_size), weight, scale, draw.tensor([*range(64)])
    )
    yield "tokens", tokens
    yield "values", values
