"""State pages in one raw buffer full of canaries, batches on them, and the plain recurrence."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from qwen3next_plugin.kernels import step as kernels
from qwen3next_plugin.kernels.causal_conv1d import causal_conv1d
from qwen3next_plugin.kernels.gated_delta_rule import gated_delta_rule
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID

CANARY = 0xFF  # as a float: NaN
GAP = 64  # bytes between the tensors of a page


@dataclass(frozen=True)
class Shape:
    """Head counts and dims of a linear-attention layer."""

    H: int
    HV: int
    K: int
    V: int

    @property
    def R(self) -> int:  # noqa: N802
        return self.HV // self.H * self.V

    @property
    def C(self) -> int:  # noqa: N802
        return self.H * (2 * self.K + self.R)


SHAPES = (Shape(2, 2, 32, 48), Shape(2, 4, 128, 96), Shape(1, 4, 48, 40), Shape(3, 6, 24, 17))
SMALL = Shape(2, 4, 16, 24)


class Pool:
    """Pages whose tensors are interleaved in one buffer whose bytes all start as canaries."""

    def __init__(
        self, s: Shape, slots: int, num_drafts: int, dtype=torch.float32, state_dtype=torch.float32
    ):
        self.shape, self.num_drafts, self.W = s, num_drafts, GRID + num_drafts
        W = self.W
        fields = {
            "conv_": ((4 + num_drafts, s.C), dtype),
            "state_": ((s.HV, s.K, s.V), state_dtype),
            "key_": ((W, s.H, s.K), torch.float32),
            "u_": ((W, s.HV, s.V), torch.float32),
            "g_": ((W, s.HV), torch.float32),
            "span_": ((2,), torch.int32),
        }
        ranges, end = {}, GAP
        for name, (shape, kind) in fields.items():
            size = math.prod(shape) * kind.itemsize
            ranges[name] = (end, end + size)
            end = (end + size + 2 * GAP - 1) // GAP * GAP
        self.raw = torch.full((slots, end), CANARY, dtype=torch.uint8)
        self.gaps = torch.ones(end, dtype=torch.bool)
        for name, (shape, kind) in fields.items():
            begin, end = ranges[name]
            self.gaps[begin:end] = False
            view = self.raw[:, begin:end].view(kind).unflatten(1, shape)
            setattr(self, name, view)

    def pages(self) -> StatePool:
        """The pool as the ops take it."""
        return StatePool(self.state_, self.key_, self.u_, self.g_, self.span_, self.conv_)

    def content(self, slot: int) -> list[Tensor]:
        """The parts of a page that its next reader uses."""
        start, end = self.span_[slot].tolist()
        p0 = start // GRID * GRID
        window = [p % self.W for p in range(p0, end)]
        inputs = [p % (4 + self.num_drafts) for p in range(max(start - 3, 0), end)]
        rings = [ring[slot, window] for ring in (self.key_, self.u_, self.g_)]
        S = [self.state_[slot]] if p0 else []
        return [self.span_[slot], self.conv_[slot, inputs], *rings, *S]

    def state_at_end(self, slot: int) -> Tensor:
        """S after the page's last token, fp64."""
        s, (start, end) = self.shape, self.span_[slot].tolist()
        p0 = start // GRID * GRID
        S = self.state_[slot].double()
        if p0 == 0:
            S = torch.zeros_like(S)
        for p in range(p0, end):
            key, u, g = (ring[slot, p % self.W].double() for ring in (self.key_, self.u_, self.g_))
            key = key.repeat_interleave(s.HV // s.H, dim=0)
            S = S * g.exp()[:, None, None] + key[:, :, None] * u[:, None, :]
        return S

    def assert_untouched_but(self, slots: list[int]) -> None:
        """Assert that no byte between the tensors, or in a slot outside `slots`, was written."""
        assert (self.raw[:, self.gaps] == CANARY).all()
        others = [i for i in range(len(self.raw)) if i not in slots]
        assert (self.raw[others] == CANARY).all()


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Step:
    """Rows of (slot, context length, tokens)."""

    rows: tuple[tuple[int, int, int], ...]

    @property
    def T(self) -> int:  # noqa: N802
        return sum(n for _, _, n in self.rows)

    def tensors(self) -> dict[str, Tensor]:
        ends = [0]
        for _, _, n in self.rows:
            ends.append(ends[-1] + n)
        return {
            "query_start_loc": int32(*ends),
            "slot": int32(*(slot for slot, _, _ in self.rows)),
            "context_len": int32(*(c for _, c, _ in self.rows)),
        }

    def bundle(self, max_query_len: int | None = None) -> kernels.Step:
        """The step as the ops take it."""
        if max_query_len is None:
            max_query_len = max(n for _, _, n in self.rows)
        return kernels.Step(**self.tensors(), num_tokens=self.T, max_query_len=max_query_len)


@dataclass(frozen=True)
class Layer:
    """Random parameters of a layer."""

    shape: Shape
    weight: Tensor
    A_log: Tensor
    dt_bias: Tensor

    @classmethod
    def random(cls, s: Shape, dtype=torch.float32) -> "Layer":
        A_log = torch.empty(s.HV).uniform_(0.1, 16).log()
        return cls(s, torch.randn(s.C, 4, dtype=dtype) / 2, A_log, torch.randn(s.HV))

    def projections(self, T: int, dtype=torch.float32) -> dict[str, Tensor]:
        """q, k, v, b, a of T tokens, as views of two grouped projections with NaN around them."""
        s = self.shape
        group = 2 * s.K + 2 * s.R  # q, k, v, z
        qkvz = torch.full((T, s.H * group + 8), torch.nan, dtype=dtype)
        qkvz = qkvz[:, : s.H * group].unflatten(1, (s.H, group))
        ba = torch.randn(T, s.H, 2 * (s.HV // s.H)).to(dtype)
        q, k, v, _ = qkvz.split([s.K, s.K, s.R, s.R], dim=-1)
        for x in (q, k, v):
            x.copy_(torch.randn(x.shape))
        b, a = ba.chunk(2, dim=-1)
        return {"q": q, "k": k, "v": v, "a": a, "b": b}

    def run(self, pool: Pool, step: Step, x: dict[str, Tensor]) -> Tensor:
        """The convolution, then the recurrence, on the pages of the pool."""
        q, k, v = self.convolve(pool, step, x)
        v = v.view(-1, self.shape.HV, self.shape.V)
        return self.recur(pool, step, {**x, "q": q, "k": k, "v": v})

    def convolve(self, pool: Pool, step: Step, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The convolution alone; q, k [T, H, K] and v [T, H, R]."""
        return causal_conv1d(
            **{name: x[name] for name in "qkv"}, weight=self.weight,
            pool_=pool.pages(), step=step.bundle(len(x["q"])),
        )  # fmt: skip

    def recur(self, pool: Pool, step: Step, x: dict[str, Tensor]) -> Tensor:
        """The recurrence alone; v is [T, HV, V]."""
        return gated_delta_rule(
            **x, A_log=self.A_log, dt_bias=self.dt_bias,
            pool_=pool.pages(), step=step.bundle(len(x["q"])),
        )  # fmt: skip

    def convolved(self, x: dict[str, Tensor]) -> Tensor:
        """[q; k; v] of a whole sequence after the convolution, fp64."""
        inputs = torch.cat([x[name].flatten(1) for name in "qkv"], dim=-1).double()
        padded = torch.cat([inputs.new_zeros(3, self.shape.C), inputs])
        taps = self.weight.double().unbind(1)
        return silu(sum(padded[j : j + len(inputs)] * tap for j, tap in enumerate(taps)))

    def recurrence(
        self, x: dict[str, Tensor], S: Tensor | None = None, states: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output [T, HV, V] and last state of a sequence after the convolution, fp64.

        The state after each token is appended to `states`.
        """
        s = self.shape

        def normalised(x: Tensor) -> Tensor:
            x = x.double()
            x = x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            return x.repeat_interleave(s.HV // s.H, dim=1)

        q, k, v = normalised(x["q"]) / s.K**0.5, normalised(x["k"]), x["v"].double()
        rate = softplus(x["a"].double().flatten(1) + self.dt_bias.double())
        decay, beta = (
            (-self.A_log.double().exp() * rate).exp(),
            x["b"].double().flatten(1).sigmoid(),
        )
        S = torch.zeros(s.HV, s.K, s.V, dtype=torch.float64) if S is None else S
        out = torch.zeros_like(v)
        for t in range(len(v)):
            S = S * decay[t, :, None, None]
            u = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", S, k[t]))
            S = S + k[t, :, :, None] * u[:, None, :]
            out[t] = torch.einsum("hkv,hk->hv", S, q[t])
            if states is not None:
                states.append(S)
        return out, S

    def recurrence_inputs(self, T: int, dtype=torch.float32) -> dict[str, Tensor]:
        """q, k, v after a convolution, a and b of T tokens, as strided views."""
        s, x = self.shape, self.projections(T, dtype)
        return {**x, "v": x["v"].unflatten(2, (-1, s.V)).flatten(1, 2)}


def rows_of(x: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """The tokens [begin, end) of the inputs."""
    return {name: value[begin:end] for name, value in x.items()}


def concatenated(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tokens of all parts, in order."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
