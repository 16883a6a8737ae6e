"""The least that a step could take: bytes that it reads, products that it computes, and the rates
at which this machine does so."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.block_model import OWN, tensors
from benchmarks.engines.steps import ROUNDS
from benchmarks.full.model import QUANTISED
from benchmarks.kernels import linear
from benchmarks.kernels.timing import seconds
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


class Limits:
    """The least milliseconds at a run's best rates: other work on the machine only lowers them."""

    def __init__(self, config: Mapping[str, Any], kind: str) -> None:
        self._config, self._kind = config, kind
        self._read = self._product = 0.0

    def measure(self) -> None:
        """Measure the rates once more."""
        self._read = max(self._read, read_rate())
        self._product = max(self._product, product_rate())

    def step(self, batch: int) -> float:
        """Of a plain step of so many requests: it reads and multiplies at the same time."""
        reading = step_bytes(self._config, self._kind, batch) / self._read
        return 1e3 * max(reading, batch * products(self._config, head=True) / self._product)

    def prompt(self, tokens: int) -> float:
        """Of a prompt of so many tokens."""
        each = products(self._config) + attention_products(self._config, tokens)
        return 1e3 * tokens * each / self._product


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


def read_rate() -> float:
    """Bytes a second of a sum over 512 MB by all threads."""
    large = torch.ones(2**26, dtype=torch.int64)
    seconds(large.sum, 1)
    return large.nbytes / min(seconds(large.sum, 1) for _ in range(ROUNDS))


def product_rate() -> float:
    """Multiplications a second of a layer in bf16, of 1,024 rows."""
    weight, _ = linear.bf16()
    call = partial(multiply, torch.randn(1024, linear.K).bfloat16(), weight)
    seconds(call, 1)
    return 1024 * linear.N * linear.K / min(seconds(call, 1) for _ in range(ROUNDS))
