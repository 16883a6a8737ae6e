"""How vLLM lays out state and KV: blocks of one size, shared by groups of layers."""

from dataclasses import dataclass
from math import ceil

from qwen3next_plugin import env
from qwen3next_plugin.engines.plan import Plan

ALIGNMENT = 128  # tokens: vLLM rounds a block to its default on a CPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks(Plan):
    """Every block holds the KV of `block_tokens` tokens, or one state page, for each layer of a
    group.
    """

    engine = "vllm"

    @classmethod
    def attends(cls) -> bool:
        return env.batch_invariant()

    @property
    def group(self) -> int:
        """Number of layers that share a block; vLLM pads the last group of each kind."""
        kinds = [layers for layers in (self.linear_layers, self.attention_layers) if layers]
        return max(kinds) if max(kinds) < 1.5 * min(kinds) else min(kinds)

    @property
    def block_tokens(self) -> int:
        """The smallest number for which a layer's KV is as large as a state page."""
        page = sum(self.state_page.values())
        return ALIGNMENT * ceil(page / (ALIGNMENT * self.kv_bytes_per_layer))

    @property
    def block_bytes(self) -> int:
        return self.group * self.block_tokens * self.kv_bytes_per_layer

    @property
    def state_blocks(self) -> int:
        """Blocks of a request of any length; prefix caching keeps the last boundary's page too."""
        return ceil(self.linear_layers / self.group) * (2 if self.flags.prefix_caching else 1)

    @property
    def kv_blocks_each(self) -> int:
        """Blocks for every `block_tokens` tokens."""
        return ceil(self.attention_layers / self.group)

    @property
    def blocks(self) -> int:
        """Blocks that fit next to the weights, except the one that vLLM keeps as its null block."""
        return max(0, self.spare // self.block_bytes - 1)

    @property
    def blocks_per_request(self) -> int:
        kv = self.kv_blocks_each * ceil(self.flags.max_model_len / self.block_tokens)
        return self.state_blocks + kv

    @property
    def fits(self) -> int:
        return self.blocks // self.blocks_per_request

    @property
    def request_bytes(self) -> int:
        return (self.blocks_per_request + 1) * self.block_bytes

    @property
    def longest(self) -> int:
        spare = (self.blocks - self.state_blocks) // max(1, self.kv_blocks_each)
        return max(0, spare) * self.block_tokens

    def shortage(self) -> str:
        if not self.longest:
            return "memory: no request of any length fits next to the weights"
        return (
            f"--max-model-len: one request needs {self.blocks_per_request} blocks and"
            f" {self.blocks} fit; lower it to {self.longest} tokens"
        )
