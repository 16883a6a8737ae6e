"""Where vLLM's prefix cache gets a state page, so that other prompts can continue from there.

vLLM keeps pages at the ends of blocks, and a block is as large as a page: 1,280 tokens at released
shapes. So chunks also end where prompts are likely to part:

- at a junction: the cache has this prompt's KV up to there, but no page;
- behind the first message, often a system prompt that many requests share;
- at the prompt's end, if it continues a conversation, or is so long that a step more is nothing.

vLLM finds a prefix to the unit (`--prefix-match-unit`), but the cache has the KV of whole blocks
only. Here each unit of a prompt is entered, so that junctions within blocks are found.
"""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from vllm.config import ModelConfig, VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.request import Request

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.patching import override
from qwen3next_plugin.engines.shared_prefixes import LEAST, first_message

UNIT = 16  # tokens
LONG = 1024  # tokens behind the last page: reading them takes far longer than one step more
TURNS = 3  # messages of a prompt that continues a conversation


def choose_unit(config: Qwen3NextConfig, vllm_config: VllmConfig) -> None:
    """Find prefixes to 16 tokens, unless the user has chosen a unit, or others read the cache.

    A model of one kind of layer has one kind of block, and its prefixes are whole blocks.
    """
    cache_config, events = vllm_config.cache_config, vllm_config.kv_events_config
    told = events is not None and events.enable_kv_cache_events
    alone = vllm_config.kv_transfer_config is None and not told
    both = config.num_linear_layers and config.num_attention_layers
    if alone and both and cache_config.enable_prefix_caching and not cache_config.block_size % UNIT:
        cache_config.prefix_match_unit = cache_config.prefix_match_unit or UNIT


def message_ends(model_config: ModelConfig) -> set[int]:
    """The tokens that end a message: eos, of the model's config and of its generation's."""
    found: set[int] = set()
    generation = model_config.try_get_generation_config()
    for eos in (model_config.hf_text_config.eos_token_id, generation.get("eos_token_id")):
        found |= {eos} if isinstance(eos, int) else set(eos or ())
    return found


class SharedPrefixes:
    """The places of a scheduler's prompts at which a page is kept.

    Args:
        unit: tokens; places are multiples of it.
        block: tokens; at the last whole block of a prompt vLLM keeps a page.
        ends: the tokens that end a message.
    """

    def __init__(self, unit: int, block: int, ends: Collection[int], *, with_drafts: bool) -> None:
        self.unit, self.block, self.ends, self.with_drafts = unit, block, ends, with_drafts
        self.places: WeakKeyDictionary[Request, list[int]] = WeakKeyDictionary()

    def foresee(self, request: Request, cached: int, junction: int) -> None:
        """Choose the places of a prompt that is about to be read, whose first tokens are cached."""
        end = self._last(request, self.unit)
        pages, places = {cached, self._last(request, self.block)}, []
        for place in sorted({junction, self._first_message(request), end}):
            if place > cached:
                before = max(page for page in pages if page <= place)
                worth = LONG if place == end and not self._continues(request) else LEAST
                if place - before >= worth:
                    places.append(place)
                    pages.add(place)
        self.places[request] = places

    def next_place(self, request: Request, start: int) -> int:
        """The first place of a prompt beyond `start`, or 0."""
        return next((at for at in self.places.get(request, ()) if at > start), 0)

    def _first_message(self, request: Request) -> int:
        """The end of the first message, where other prompts may find the page."""
        return self._found(first_message(request.prompt_token_ids or (), self.ends), self.unit)

    def _last(self, request: Request, size: int) -> int:
        """The last place that the same prompt would find: it reads one token at least."""
        tokens = request.num_prompt_tokens
        return self._found(tokens if self.with_drafts else tokens - 1, size)

    def _found(self, tokens: int, size: int) -> int:
        """Where a prompt that shares so many tokens finds a page.

        With drafts vLLM drops the last of what it finds: the drafter's KV knows the token behind.
        """
        return max(0, tokens // size - self.with_drafts) * size

    def _continues(self, request: Request) -> bool:
        """Whether a prompt continues a conversation, so that another one will probably do so."""
        tokens = request.prompt_token_ids or ()
        return sum(map(tokens.count, self.ends)) >= TURNS


@override(
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager.cache_blocks",
    "vllm.v1.core.single_type_kv_cache_manager.FullAttentionManager._cache_partial_tail_block",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.get_num_blocks_to_allocate",
    "vllm.v1.core.single_type_kv_cache_manager.SingleTypeKVCacheManager.shared_prefix_checkpoint",
    "vllm.v1.core.block_pool.BlockPool._insert_block_hash",
    reason="vLLM finds junctions at the ends of blocks only, keeps a page at a junction within a "
    "block only if asked, and with drafts, and copies parts of blocks before they are computed",
    remove_when="vLLM finds junctions at each unit and keeps pages there",
)
class Units:
    """Enters the KV of prompts in vLLM's prefix cache unit by unit; lets it keep pages there.

    A unit is entered once its KV is computed: who continues within a block copies it before the
    step. vLLM enters whole blocks before that, so none of `filling`, this step's, is copied.
    """

    def __init__(self, cache: KVCacheManager, prefixes: SharedPrefixes) -> None:
        self.pool, self.prefixes, self.unit = cache.block_pool, prefixes, prefixes.unit
        self.filling: set[int] = set()
        managers = cache.coordinator.single_type_managers
        self.attention = [one for one in managers if isinstance(one, FullAttentionManager)]
        self.states = [one for one in managers if isinstance(one, MambaManager)]
        for manager in self.states:
            manager.shared_prefix_checkpoint = True
        for manager in self.attention:
            count = manager.get_num_blocks_to_allocate
            manager.get_num_blocks_to_allocate = partial(self._blocks_to_allocate, manager, count)
            manager.cache_blocks = partial(self._cache_blocks, manager, manager.cache_blocks)
            manager._cache_partial_tail_block = lambda *_: None

    def begin_step(self) -> None:
        self.filling.clear()

    def defer(self) -> bool:
        """Whether somebody may have to wait for the next step to begin at what this one caches."""
        return bool(self.filling) or any(one.cached_blocks_this_step for one in self.states)

    def fits(self, request: Request, cached: int) -> bool:
        """Whether a prompt fits that continues within a block, of which it needs copies."""
        if not cached % self.attention[0].block_size:
            return True
        kv = sum(cdiv(request.num_tokens, one.block_size) + 1 for one in self.attention)
        pages = 3 * len(self.states)  # the cached one, its copy, and the next block's
        return kv + pages < self.pool.num_gpu_blocks

    def enter(self, request: Request, start: int, end: int) -> None:
        """Enter tokens [start, end) of a prompt, once a step has computed them."""
        for manager in self.attention:
            self._enter(manager, request, start, end)

    def _cache_blocks(
        self,
        manager: FullAttentionManager,
        host: Callable[..., None],
        request: Request,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Around `cache_blocks`: vLLM forgets the units of a block when it enters more of it."""
        name, cached = request.request_id, manager.num_cached_block
        before = cached.get(name, 0)
        host(request, *args, **kwargs)
        filled = manager.req_to_blocks[name][before : cached.get(name, 0)]
        self.filling.update(block.block_id for block in filled)
        computed = request.num_computed_tokens
        if computed <= request.num_prompt_tokens or filled:
            self._enter(manager, request, before * manager.block_size, computed)

    def _blocks_to_allocate(
        self,
        manager: FullAttentionManager,
        host: Callable[..., int],
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Around `get_num_blocks_to_allocate`: too many, to wait a step for one of `filling`."""
        within = num_local_computed_tokens % manager.block_size
        if within and new_computed_blocks and new_computed_blocks[-1].block_id in self.filling:
            return self.pool.num_gpu_blocks + 1
        counts = (total_computed_tokens, num_local_computed_tokens)
        return host(request_id, num_tokens, new_computed_blocks, *counts, *args, **kwargs)

    def _enter(self, manager: FullAttentionManager, request: Request, start: int, end: int) -> None:
        size, group = manager.block_size, manager.kv_cache_group_id
        blocks = manager.req_to_blocks.get(request.request_id, ())
        end = min(end, request.num_prompt_tokens, size * len(blocks))
        for at in range(start // size * size + self.unit, end + 1, self.unit):
            if at % size:
                prefix = prefix_hash(request, at, self.unit)
                key = make_block_hash_with_group_id(prefix, group)
                self.pool._insert_block_hash(key, blocks[at // size], num_tokens=at)


def prefix_hash(request: Request, tokens: int, unit: int) -> BlockHash:
    """vLLM's hash of so many first tokens."""
    return request.block_hashes[tokens // unit - 1]
