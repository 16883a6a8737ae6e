"""SGLang's prefix cache in a folder that survives restarts: a linker of its radix cache.

The radix cache asks a linker for what follows its own longest prefix. SGLang's key of a token
depends on all tokens before it. A prefix that ends at a node of the radix tree has one file with
its state pages, and files of KV, which prefixes share independently of the tree's nodes.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sglang.srt.arg_groups.model_override_base import model_config_of
from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)
from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.extras.fleet.block_files import EVERY, BlockFiles, least_limit, pieces, writer
from qwen3next_plugin.extras.fleet.sglang.folder_flags import space

STATE, KV = ".state", ".kv"
WAITING = 1 << 30  # bytes of copies that may wait to be written


class Pools:
    """The KV of a token, the MTP layer's included, and the state pages of a request, as bytes."""

    def __init__(self, params: Any) -> None:
        trunk = params.token_to_kv_pool_allocator.get_kvcache()
        drafts = (*params.mtp_draft_device_pools, *params.sidecar_draft_device_pools)
        self.kv = [
            buffer.view(len(buffer), -1).view(torch.uint8)  # [slots, bytes]
            for pool in (each.full_kv_pool for each in (trunk, *drafts))
            for buffer in (*pool.k_buffer, *pool.v_buffer)
        ]
        self.pages = params.req_to_token_pool.mamba_pool.pages
        self.layout = params.req_to_token_pool.mamba_pool.layout
        self.token_bytes = sum(buffer.shape[1] for buffer in self.kv)
        self.page_bytes = self.pages.shape[0] * self.pages.shape[2]

    def read_kv(self, slots: torch.Tensor) -> torch.Tensor:
        """Copy the KV of tokens, layer by layer."""
        return torch.cat([buffer[slots].flatten() for buffer in self.kv])

    def write_kv(self, slots: torch.Tensor, content: torch.Tensor) -> None:
        """Put the KV of the last tokens of a file into slots."""
        tokens = len(content) // self.token_bytes
        sizes = [tokens * buffer.shape[1] for buffer in self.kv]
        for buffer, part in zip(self.kv, content.split(sizes), strict=True):
            buffer[slots] = part.view(tokens, -1)[tokens - len(slots) :]

    def read_page(self, slot: torch.Tensor) -> torch.Tensor:
        """Copy the pages of a request, layer by layer."""
        return self.pages[:, slot].clone(memory_format=torch.contiguous_format).flatten()

    def write_page(self, slot: torch.Tensor, content: torch.Tensor) -> None:
        """Put the pages of a request into a slot."""
        self.pages[:, slot] = content.view(len(self.pages), -1)


class Staged(NamedTuple):
    """A prefix that was read and waits for its slots."""

    keys: list[str]
    kv: list[tuple[int, torch.Tensor]]  # for each file: tokens needed, and content
    page: torch.Tensor


class FolderLinker(UnifiedCacheLinker):
    """Reads a prefix when its request is scheduled, and writes it when the request has ended."""

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any],
        forward_stream: Any,
    ) -> None:
        self.memory = Pools(params)
        self.layer_done_counter = LayerWiseLoadCounter(0)  # loading is complete when it returns
        ranks = get_parallel()
        least = ranks.tp_size * least_limit(
            1, self.memory.page_bytes + EVERY * self.memory.token_bytes
        )
        limit = extra_config["folder_bytes"]
        if limit < least:
            raise ConfigError(
                f"folder_bytes = {limit}: must hold the shortest prefix that can be found again, "
                f"so at least {least} bytes; better a hundred times as many"
            )
        self.files = BlockFiles(Path(extra_config["folder"]), limit)
        sizes = self.memory.layout, self.memory.token_bytes, ranks.tp_size
        shared = space(server_args, model_config_of(server_args), *sizes)
        self.space = f"{shared}/{ranks.tp_rank}"
        self.staged: Staged | None = None
        self.states: set[str] = set()  # keys whose state pages are in the folder
        self.listed = 0  # the folder's time of change when `states` was read
        self.writer = writer()
        self.writing: dict[str, tuple[Future[None], int]] = {}  # files, their bytes
        self.failures: set[int | None] = set()  # errors of writing (errno) that were logged

    # What SGLang asks.

    def lookup(self, rid: str, transfers: list[PoolTransfer]) -> list[int]:
        """Read the longest prefix in the folder; returns its number of keys."""
        keys = _of(transfers, PoolName.KV).keys
        states = self._list_states()
        ends = (end for end in range(len(keys), 0, -1) if keys[end - 1] in states)
        found = next(([end] for end in ends if self._stage(keys[:end])), [])
        if not found:
            self.staged = None  # left over from a request that did not load it
        return found

    def load(self, rid: str, transfers: list[PoolTransfer]) -> bool:
        """Put what `lookup` has read into its slots."""
        kv, page = _of(transfers, PoolName.KV), _of(transfers, PoolName.MAMBA)
        staged, self.staged = self.staged, None
        if staged is None or staged.keys != kv.keys:
            return False
        begin = 0
        for tokens, content in staged.kv:
            self.memory.write_kv(kv.device_indices[begin : begin + tokens], content)
            begin += tokens
        self.memory.write_page(page.device_indices[0], staged.page)
        return True

    def start_layer_wise_loading(self) -> int:
        """Nothing to wait for."""
        return -1

    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """All is loaded."""
        return True

    def cancel_queued_load(self, rid: str) -> bool:
        """Nothing is queued."""
        return False

    def offload(self, transfers: list[PoolTransfer], session_id: str | None = None) -> bool:
        """Nothing: SGLang calls this before the MTP layer has read the tokens; see `keep`."""
        return False

    def num_completed_offloads(self) -> int:
        """None: `offload` accepts nothing."""
        return 0

    def pop_completed_offload(self) -> bool:
        """Not called: `offload` accepts nothing."""
        raise IndexError("no offload was accepted")

    def reset(self) -> None:
        """Forget what was read; files stay."""
        self.staged = None

    def close(self) -> None:
        """Write what waits, then end the thread."""
        self.writer.shutdown()

    # Files.

    def keep(self, cache: Any, node_id: int) -> None:
        """Write the prefixes that end at a node of the radix tree and at the nodes above it."""
        tree = cache.tree_core
        keys = [*tree.get_prefix_hash_values(node_id), *tree.get_hash_values(node_id)]
        slots = cache.path_device_indices(node_id)
        path = tree.collect_path_info([node_id])[0]
        pages = {
            node.path_end: page
            for node in path
            if (page := tree.get_component_device_value(node.node_id, ComponentType.MAMBA))
            is not None
        }
        for begin, end in pieces(keys[: max(pages, default=0)], pages):
            self._write(
                keys[end - 1] + KV,
                (end - begin) * self.memory.token_bytes,
                partial(self.memory.read_kv, slots[begin:end]),
            )
        for end, page in pages.items():
            self._write(
                keys[end - 1] + STATE,
                self.memory.page_bytes,
                partial(self.memory.read_page, page[0]),
            )

    def _write(self, name: str, nbytes: int, copied: Callable[[], torch.Tensor]) -> None:
        """Write a copy in the background; an existing file is marked as recently used instead."""
        name = f"{self.space}/{name}"
        if self.files.holds(name, nbytes):
            self.files.use(name)
        elif name not in self.writing:
            done = self.writer.submit(self._write_file, name, copied())
            self.writing[name] = done, nbytes
        for oldest, (done, _) in list(self.writing.items()):
            if not done.done() and sum(each for _, each in self.writing.values()) <= WAITING:
                break
            done.result()
            del self.writing[oldest]

    def _write_file(self, name: str, content: torch.Tensor) -> None:
        try:
            self.files.write(name, _memory(content))
        except OSError as error:
            if error.errno not in self.failures:
                logger.warning(
                    "qwen3next_plugin: some prefixes are not kept: %s: %s",
                    *(self.files.folder, error.strerror),
                )
            self.failures.add(error.errno)

    def _list_states(self) -> set[str]:
        folder = self.files.folder / self.space
        try:
            changed = folder.stat().st_mtime_ns
            if changed != self.listed:
                self.states = {path.stem for path in folder.glob(f"*{STATE}")}
                self.listed = changed
        except OSError:
            return set()
        return self.states

    def _stage(self, keys: list[str]) -> bool:
        """Read the files of a prefix; `keys` are those of the tokens that SGLang lacks."""
        if self.staged is not None and self.staged.keys == keys:
            return True  # read already, for a request that did not fit the last step
        self.staged = None
        page = self._read(keys[-1] + STATE, self.memory.page_bytes)
        kv = [  # all, so that each damaged file is removed, and written again later
            (end - begin, self._read_kv(keys[end - 1], end - begin, whole=begin > 0))
            for begin, end in pieces(keys)
        ]
        whole = [(tokens, content) for tokens, content in kv if content is not None]
        if page is None or len(whole) < len(kv):
            return False
        self.staged = Staged(keys, whole, page)
        return True

    def _read_kv(self, key: str, tokens: int, *, whole: bool) -> torch.Tensor | None:
        """Read a file of KV; unless `whole`, it may begin with tokens that SGLang already has."""
        least = tokens * self.memory.token_bytes
        nbytes = self.files.nbytes(f"{self.space}/{key}{KV}")
        if nbytes < least or (whole and nbytes > least):
            return None
        return self._read(key + KV, nbytes)

    def _read(self, name: str, nbytes: int) -> torch.Tensor | None:
        content = torch.empty(nbytes, dtype=torch.uint8)
        found = self.files.read(f"{self.space}/{name}", _memory(content))
        return content if found else None


def _of(transfers: list[PoolTransfer], name: PoolName) -> Any:
    return next(transfer for transfer in transfers if transfer.name == name)


def _memory(content: torch.Tensor) -> memoryview:
    return content.numpy().data
