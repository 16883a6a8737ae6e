"""What a model takes on one rank under an engine's flags, and how many requests fit."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Literal, TypeVar

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.memory import default_pools, room
from qwen3next_plugin.model.checkpoint.sizes import DTYPES, rank_bytes, without_mtp
from qwen3next_plugin.model.checkpoint.units import readable

GIB = 2**30
StateDtype = Literal["float32", "bfloat16"]  # as STATE_DTYPES of model/state.py
P = TypeVar("P", bound="Plan")


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
    threads: int  # of a rank
    mapped: int = 0  # bytes of weights that stay in files, which Linux pages
    kv_itemsize: int | None = None  # bytes; None: as dtype
    pools: int | None = None  # bytes for states and KV; None: all that the weights leave


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(ABC):
    """Bytes on one tensor-parallel rank, before an engine lays them out."""

    engine: ClassVar[str]
    weights: Mapping[str, int]  # by part of the model
    state_page: Mapping[str, int]  # of one linear layer and slot, by part of the page
    linear_layers: int
    attention_layers: int  # the drafter's too
    kv_bytes_per_layer: int  # of one token
    scratch: int  # of our attention, whatever the context
    flags: Flags

    @classmethod
    @abstractmethod
    def attends(cls) -> bool:
        """Whether the model runs on our attention."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes in all attention layers, the drafter's included."""
        return self.attention_layers * self.kv_bytes_per_layer

    @property
    def state_bytes_per_slot(self) -> int:
        """Bytes of one page in each linear layer."""
        return self.linear_layers * sum(self.state_page.values())

    @property
    def spare(self) -> int:
        """Bytes for states and KV, next to the weights and the attention's scratch memory."""
        left = self.flags.memory - sum(self.weights.values()) - self.scratch
        most = room(left, self.flags.mapped)
        return most if self.flags.pools is None else min(most, self.flags.pools)

    @property
    @abstractmethod
    def request_bytes(self) -> int:
        """Bytes for states and KV with which one request of max_model_len tokens fits."""

    def with_default_pools(self: P) -> P:
        """The plan with the default pools, for an engine without a setting for them."""
        pools = default_pools(self.spare, self.request_bytes)
        return replace(self, flags=replace(self.flags, pools=pools))

    @property
    @abstractmethod
    def fits(self) -> int:
        """Requests of max_model_len tokens that the memory holds."""

    @property
    @abstractmethod
    def longest(self) -> int:
        """Tokens of the longest request that the memory holds."""

    @abstractmethod
    def shortage(self) -> str:
        """Why not one request fits, and the fix."""

    def refusal(self, setting: str) -> str:
        """Why an engine does not start, and the fix. Args: setting: the one for the pools."""
        weights, free = sum(self.weights.values()), self.flags.memory
        return (
            f"{self.shortage()}. Of {readable(free)} that are free for one rank, weights take "
            f"{readable(weights)}: end other programs, serve in fewer bits "
            f"(QWEN3NEXT_QUANTISE=int4) or on more ranks, or set {setting} if you know better"
        )

    @property
    def concurrency(self) -> int:
        """Requests of max_model_len tokens that run at once."""
        return min(self.flags.max_num_seqs, self.fits)


def make_plan(
    engine: type[P], config: Qwen3NextConfig, sizes: Mapping[str, int], flags: Flags
) -> P:
    """Plan the memory of one rank.

    Args:
        sizes: bytes of every tensor; the MTP layer's are left out where nothing is drafted.
    """
    from qwen3next_plugin.kernels.paged_attention import SCRATCH

    drafter = config.num_nextn_predict_layers if flags.num_speculative_tokens else 0
    more = sum(models.kv_elements(config) for models in extras.models(engine.engine))
    kv_elements = config.num_key_value_heads_per_rank * (2 * config.head_dim + more)
    weights = dict(rank_bytes(sizes if drafter else without_mtp(sizes), config))
    if drafter:
        weights["draft head"] = draft_head_bytes(config, sizes)
    return engine(
        weights=weights,
        state_page=state_page(config, flags),
        linear_layers=config.num_linear_layers,
        attention_layers=config.num_attention_layers + drafter,
        kv_bytes_per_layer=kv_elements * (flags.kv_itemsize or DTYPES[flags.dtype]),
        scratch=flags.threads * SCRATCH if engine.attends() else 0,
        flags=flags,
    )


def draft_head_bytes(config: Qwen3NextConfig, sizes: Mapping[str, int]) -> int:
    """Bytes of one rank's int8 draft head with its scales; an upper bound.

    If the trunk's head stays in memory, as one in int8 does, only the draft vocabulary is copied.
    This does not count on a head that stays because our kernel packs it in bf16.
    """
    from qwen3next_plugin.model.checkpoint.tensors import HEAD
    from qwen3next_plugin.model.quantisation.at_load import INT8
    from qwen3next_plugin.mtp.draft_head import DRAFTED

    rows = ceil(config.vocab_size / config.tp_size)
    # 0: the head stays in a mapped file
    in_int8 = sizes.get(HEAD) in (0, INT8.nbytes(config.vocab_size, config.hidden_size))
    if in_int8 or config.tie_word_embeddings:
        rows = min(rows, DRAFTED)
    return rows * (config.hidden_size + 4)


def state_page(config: Qwen3NextConfig, flags: Flags) -> dict[str, int]:
    """Bytes of one linear layer's page: S, the window of tokens after it, the conv inputs.

    Pages are of one size, so each has room for what other layers of a kind of model keep.
    """
    import torch

    from qwen3next_plugin.model.kinds import kind_of
    from qwen3next_plugin.model.state import PageLayout

    layout = PageLayout.from_config(
        config,
        num_drafts=flags.num_speculative_tokens,
        activation_dtype=getattr(torch, flags.dtype),
        state_dtype=getattr(torch, flags.state_dtype),
        shared=True,
    )
    nbytes = layout.nbytes()
    S, conv = nbytes.pop("state"), nbytes.pop("conv")
    shared = sum(nbytes.pop(name) for name, *_ in layout.shared)
    page = {"S": S, "window": sum(nbytes.values()), "conv": conv}
    if shared and (kind := kind_of(config)):
        page[kind.keeps] = shared
    return page
