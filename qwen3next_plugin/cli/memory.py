"""How vLLM lays out a model's state and KV in memory, and how many requests fit."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from qwen3next_plugin.cli.sizes import DTYPES, rank_bytes
from qwen3next_plugin.config import Qwen3NextConfig

GIB = 2**30
BLOCK_ALIGNMENT = 128  # tokens: vLLM rounds a block to its default on a CPU
StateDtype = Literal["float32", "bfloat16"]  # as STATE_DTYPES of model/state.py


@dataclass(frozen=True, slots=True)
class Flags:
    """The engine's flags that memory depends on, and the memory that one rank may use."""

    max_model_len: int
    max_num_seqs: int
    num_speculative_tokens: int  # 0: no drafts
    dtype: str
    state_dtype: StateDtype
    prefix_caching: bool
    memory: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes on one tensor-parallel rank, laid out as vLLM does: blocks shared by groups of layers.

    Every block is of one size and holds either the KV of `block_tokens` tokens or one state page,
    for each layer of a group.
    """

    weights: Mapping[str, int]  # by part of the model
    state_page: Mapping[str, int]  # of one linear layer and slot, by part of the page
    linear_layers: int
    kv_bytes_per_token: int  # all attention layers, the drafter's too
    block_tokens: int
    block_bytes: int
    state_blocks: int  # a request holds these at any length
    kv_blocks_each: int  # blocks for every `block_tokens` tokens
    flags: Flags

    @property
    def blocks(self) -> int:
        """Blocks that fit next to the weights, except the one that vLLM keeps as its null block."""
        return max(0, (self.flags.memory - sum(self.weights.values())) // self.block_bytes - 1)

    @property
    def blocks_per_request(self) -> int:
        kv = self.kv_blocks_each * ceil(self.flags.max_model_len / self.block_tokens)
        return self.state_blocks + kv

    @property
    def state_bytes_per_slot(self) -> int:
        return self.linear_layers * sum(self.state_page.values())

    @property
    def concurrency(self) -> int:
        """Requests of max_model_len tokens that run at once."""
        return min(self.flags.max_num_seqs, self.blocks // self.blocks_per_request)

    @property
    def bound(self) -> str:
        """What limits the concurrency, and the fix if it is 0."""
        fits, flags = self.blocks // self.blocks_per_request, self.flags
        if (weights := sum(self.weights.values())) >= flags.memory:
            return (
                f"the weights: {gib(weights)} do not fit in {gib(flags.memory)}; use more ranks"
                " (--tp), a quantised checkpoint, or more memory (--memory)"
            )
        if not fits:
            spare = (self.blocks - self.state_blocks) // max(1, self.kv_blocks_each)
            return (
                f"--max-model-len: one request needs {self.blocks_per_request} blocks and"
                f" {self.blocks} fit; lower it to {max(0, spare) * self.block_tokens} tokens"
                if spare > 0
                else "memory: no request of any length fits next to the weights"
            )
        if fits >= flags.max_num_seqs:
            return f"--max-num-seqs: the memory would hold {fits} requests of this length"
        return f"memory: {fits} of the {flags.max_num_seqs} requests of --max-num-seqs fit"


def make_plan(config: Qwen3NextConfig, sizes: Mapping[str, int], flags: Flags) -> Plan:
    """Plan the memory of one rank; `sizes` are the bytes of every tensor that is loaded."""
    drafter = config.num_nextn_predict_layers if flags.num_speculative_tokens else 0
    linear, attention = config.num_linear_layers, config.num_attention_layers + drafter
    kv_per_layer = 2 * config.num_key_value_heads_per_rank * config.head_dim * DTYPES[flags.dtype]
    page = state_page(config, flags)
    block_tokens = BLOCK_ALIGNMENT * ceil(sum(page.values()) / (BLOCK_ALIGNMENT * kv_per_layer))
    group = _group_size(linear, attention)
    weights = dict(rank_bytes(sizes, config))
    if drafter:  # int8, and one scale for each row
        rows = ceil(config.vocab_size / config.tp_size)
        weights["draft head"] = rows * (config.hidden_size + 4)
    return Plan(
        weights=weights,
        state_page=page,
        linear_layers=linear,
        kv_bytes_per_token=attention * kv_per_layer,
        block_tokens=block_tokens,
        block_bytes=group * block_tokens * kv_per_layer,
        # prefix caching also keeps the page at the last block boundary
        state_blocks=ceil(linear / group) * (2 if flags.prefix_caching else 1),
        kv_blocks_each=ceil(attention / group),
        flags=flags,
    )


def state_page(config: Qwen3NextConfig, flags: Flags) -> dict[str, int]:
    """Bytes of one linear layer's page: S, the window of tokens after it, the conv inputs."""
    import torch

    from qwen3next_plugin.model.state import PageLayout

    nbytes = PageLayout.from_config(
        config,
        draft_tokens=flags.num_speculative_tokens,
        activation_dtype=getattr(torch, flags.dtype),
        state_dtype=getattr(torch, flags.state_dtype),
    ).nbytes()
    S, conv = nbytes.pop("state"), nbytes.pop("conv")
    return {"S": S, "window": sum(nbytes.values()), "conv": conv}


def _group_size(linear: int, attention: int) -> int:
    """Layers that share a block; vLLM pads the last group of each kind."""
    kinds = [layers for layers in (linear, attention) if layers]
    return max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)


def gib(nbytes: int) -> str:
    """Bytes in GiB, for a reader."""
    return f"{nbytes / GIB:.2f} GiB"
