"""The least that a step could take: bytes that it reads, products that it computes, and the rates
at which this machine does so."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch

from benchmarks.block_model import OWN, tensors
from benchmarks.full.model import QUANTISED
from benchmarks.kernels import linear
from benchmarks.kernels.timing import Call, seconds
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
WINDOW = 4.0  # seconds


class Work(NamedTuple):
    """What a step, or a prompt, does at the least."""

    nbytes: float  # read
    products: float


class Rates(NamedTuple):
    """What a machine does in a second."""

    nbytes: float
    products: float


class Round(NamedTuple):
    """Milliseconds that something took, and the least that the machine could take just then."""

    time: float
    limit: float


def step_work(config: Mapping[str, Any], kind: str, batch: int) -> Work:
    """What a plain step of so many requests does."""
    return Work(step_bytes(config, kind, batch), batch * products(config, head=True))


def prompt_work(config: Mapping[str, Any], tokens: int) -> Work:
    """What a prompt does: reading for so many tokens takes no time."""
    return Work(0, tokens * (products(config) + attention_products(config, tokens)))


def rounds_of(work: Work, timed: Callable[[], float], rounds: int) -> list[Round]:
    """Rounds of what takes the milliseconds `timed()`, which reads and multiplies at once.

    A machine that others share may compute three times as much in one second as in the next: each
    round has its own limit, at the mean of the rates before and after it.
    """
    found, before = [], measured_rates()
    for _ in range(rounds):
        milliseconds, after = timed(), measured_rates()
        rates = Rates(*(fmean(each) for each in zip(before, after, strict=True)))
        limit = 1e3 * max(work.nbytes / rates.nbytes, work.products / rates.products)
        found.append(Round(milliseconds, limit))
        before = after
    return found


def mean(rounds: Sequence[Round]) -> Round:
    """The mean time and the mean limit."""
    return Round(*(fmean(each) for each in zip(*rounds, strict=True)))


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


def measured_rates() -> Rates:
    """Of sums over 512 MB, and of a layer in bf16 for 1,024 rows, by all threads."""
    large, (weight, _) = torch.ones(2**26, dtype=torch.int64), linear.bf16()
    multiplied = partial(multiply, torch.randn(1024, linear.K).bfloat16(), weight)
    reading, multiplying = mean_seconds(large.sum, multiplied)
    return Rates(large.nbytes / reading, 1024 * linear.N * linear.K / multiplying)


def mean_seconds(*calls: Call) -> list[float]:
    """Mean seconds of each call, in turns for at least WINDOW seconds, after one that is not timed.

    In turns, so that the rate of each is that of the seconds next to a round.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    begin = time.perf_counter()
    while time.perf_counter() - begin < WINDOW:
        for call, found in zip(calls, times, strict=True):
            found.append(seconds(call, 1))
    return [fmean(found) for found in times]
