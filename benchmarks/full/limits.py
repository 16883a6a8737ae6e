"""The least that a step could take: bytes that it reads, products that it computes, and the rates
at which this machine does so."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from operator import truediv
from typing import Any, NamedTuple

import torch

from benchmarks.block_model import OWN, tensors
from benchmarks.full.model import QUANTISED
from benchmarks.kernels import linear
from benchmarks.kernels.timing import Call
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.linear import linear as multiply
from qwen3next_plugin.kernels.step import GRID
from qwen3next_plugin.model.checkpoint.layouts import SHARD
from qwen3next_plugin.model.quantisation.modules import MIXING_WEIGHTS
from qwen3next_plugin.model.state import PageLayout

GROUP = 128  # columns of a scale
# Bits of a quantised weight, its scales included; zero points where the tool always writes them.
BITS = {"int4": 4 + 16 / GROUP, "int8": 8, "fp8": 8 + 32 / GROUP, "nvfp4": 4.5, "bf16": 16}
BITS |= dict.fromkeys(("gptq", "awq"), BITS["int4"] + 8 / GROUP)
EMBEDDING, HEAD, _ = OWN
WINDOW = 5.0  # seconds


class Work(NamedTuple):
    """Bytes read and numbers multiplied: in a step, or in a second."""

    nbytes: float
    products: float


class Round(NamedTuple):
    """Milliseconds that something took, and the least that the machine could take just then."""

    time: float
    limit: float

    @property
    def nearness(self) -> float:
        """One is the limit."""
        return self.limit / self.time


def step_work(config: Mapping[str, Any], kind: str, batch: int) -> Work:
    """Of a plain step of so many requests."""
    return Work(step_bytes(config, kind, batch), batch * products(config, head=True))


def prompt_work(config: Mapping[str, Any], tokens: int) -> Work:
    """Of a prompt: what it reads serves many tokens."""
    return Work(0, tokens * (products(config) + attention_products(config, tokens)))


def rounds_of(work: Work, timed: Callable[[], float], rounds: int) -> list[Round]:
    """Rounds of what takes the milliseconds `timed()`: reading and multiplying at the same time.

    A machine that others share may compute three times as much in one second as in the next: each
    round has its own limit, at the mean of the rates before and after it.
    """
    found, before = [], per_second(work)
    for _ in range(rounds):
        milliseconds, after = timed(), per_second(work)
        rates = [(early + late) / 2 for early, late in zip(before, after, strict=True)]
        found.append(Round(milliseconds, 1e3 * max(map(truediv, work, rates))))
        before = after
    return found


def middle(rounds: Iterable[Round]) -> Round:
    """The median round by nearness; of an even number, the farther one."""
    ordered = sorted(rounds, key=lambda each: each.nearness)
    return ordered[(len(ordered) - 1) // 2]


def step_bytes(config: Mapping[str, Any], kind: str, batch: int) -> float:
    """What a plain step of so many requests reads and writes: weights and states.

    Every token chooses its experts at random. Keys and values are not counted: requests are short.
    """
    weights = sum(
        math.prod(shape) * _share(name, config, batch) * _bits(name, kind) / 8
        for name, shape in tensors(config).items()
        if name != EMBEDDING and not name.startswith("mtp.") and not SHARD.search(name)
    )
    return weights + batch * state_bytes(config)


def state_bytes(config: Mapping[str, Any]) -> float:
    """A request's recurrent states, read in each step and written once in GRID."""
    parsed = Qwen3NextConfig.from_hf(config)
    layout = PageLayout.from_config(
        parsed, num_drafts=0, activation_dtype=torch.bfloat16, state_dtype=torch.float32
    )
    layers = parsed.layer_types.count("linear_attention")
    return layers * layout.nbytes()["state"] * (1 + 1 / GRID)


def products(config: Mapping[str, Any], *, head: bool = False) -> float:
    """Multiplications of a token in its weights.

    `head`: also the output head's, which a prompt's tokens need not.
    """
    shapes = tensors(config)
    layers = sum(
        math.prod(shape) * (_active(config) if ".experts." in name else 1)
        for name, shape in shapes.items()
        if len(shape) == 2 and name not in OWN and not name.startswith("mtp.")
    )
    return layers + head * math.prod(shapes[HEAD])


def attention_products(config: Mapping[str, Any], tokens: int) -> float:
    """Multiplications of a prompt's average token with the keys and values up to its own."""
    parsed = Qwen3NextConfig.from_hf(config)
    layers = parsed.layer_types.count("full_attention")
    return layers * parsed.num_attention_heads * parsed.head_dim * (tokens + 1)


def _active(config: Mapping[str, Any]) -> float:
    """The share of a layer's experts that a token chooses."""
    return config["num_experts_per_tok"] / config["num_experts"]


def _share(name: str, config: Mapping[str, Any], tokens: int) -> float:
    return 1 - (1 - _active(config)) ** tokens if ".experts." in name else 1


def _bits(name: str, kind: str) -> float:
    """Bits of a weight as it is served."""
    if kind != "bf16" and (name == HEAD or MIXING_WEIGHTS.search(name)):
        return 8
    return BITS[kind] if QUANTISED.match(name) else 16


def per_second(work: Work) -> Work:
    """What this machine does now of what there is to do."""
    return Work(
        read_rate() if work.nbytes else math.inf, product_rate() if work.products else math.inf
    )


def read_rate() -> float:
    """Bytes a second of sums over 512 MB by all threads."""
    large = torch.ones(2**26, dtype=torch.int64)
    return large.nbytes / mean_seconds(large.sum)


def product_rate() -> float:
    """Multiplications a second of a layer in bf16, of 1,024 rows."""
    weight, _ = linear.bf16()
    call = partial(multiply, torch.randn(1024, linear.K).bfloat16(), weight)
    return 1024 * linear.N * linear.K / mean_seconds(call)


def mean_seconds(call: Call) -> float:
    """Seconds of a call, within WINDOW seconds of them."""
    call()
    calls, begin = 0, time.perf_counter()
    while (passed := time.perf_counter() - begin) < WINDOW:
        call()
        calls += 1
    return passed / calls
