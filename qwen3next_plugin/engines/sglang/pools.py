"""How SGLang lays out state and KV: a pool of slots beside a pool of tokens."""

from dataclasses import dataclass
from math import ceil

from qwen3next_plugin.engines.plan import Plan

ALIGNMENT = 64  # bytes: engines/sglang/state/pages.py starts a page at a cache line
STATE_TO_KV = 0.9  # the default of --mamba-full-memory-ratio
SLOTS_PER_REQUEST = 3  # with the radix cache, in its no_buffer strategy


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools(Plan):
    """One slot of each pool is padding."""

    engine = "sglang"

    @classmethod
    def attends(cls) -> bool:
        return True

    @property
    def slot_bytes(self) -> int:
        page = sum(self.state_page.values())
        return self.linear_layers * -(-page // ALIGNMENT) * ALIGNMENT

    @property
    def slots_per_request(self) -> int:
        return SLOTS_PER_REQUEST if self.flags.prefix_caching else 1

    @property
    def slots(self) -> int:
        """Slots in a fixed share of the memory; without the radix cache, one for each request."""
        if not self.flags.prefix_caching:
            return self.flags.max_num_seqs
        share = self.spare * STATE_TO_KV / (1 + STATE_TO_KV)
        return max(0, int((share - self.slot_bytes) // self.slot_bytes))

    @property
    def tokens(self) -> int:
        """Tokens whose KV fits next to the weights and slots."""
        spare = self.spare - (self.slots + 1) * self.slot_bytes
        return max(0, spare // max(1, self.kv_bytes_per_token))

    @property
    def fits(self) -> int:
        return min(self.slots // self.slots_per_request, self.tokens // self.flags.max_model_len)

    @property
    def request_bytes(self) -> int:
        kv = self.flags.max_model_len * self.kv_bytes_per_token
        if not self.flags.prefix_caching:
            return (self.slots + 1) * self.slot_bytes + kv
        slots = (self.slots_per_request + 1) * self.slot_bytes
        return ceil((1 + STATE_TO_KV) * max(slots / STATE_TO_KV, kv)) + self.slot_bytes

    @property
    def longest(self) -> int:
        return self.tokens if self.slots >= self.slots_per_request else 0

    def shortage(self) -> str:
        if not self.longest:
            return "memory: no request of any length fits next to the weights"
        return (
            f"--max-model-len: one request needs {self.flags.max_model_len} tokens and"
            f" {self.tokens} fit; lower it to {self.tokens} tokens"
        )
