"""Lets FolderLinker keep a prefix when its request has ended.

SGLang's modules are imported inside, because patches are registered before SGLang has chosen its
device.
"""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch


@patch(
    When.ON_CPU,
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree",
    reason="SGLang gives a linker the new nodes of a prompt before the MTP layer has read it, "
    "and no node above them, in which a file of KV may begin",
    remove_when="SGLang tells a linker when a request has ended, with its whole prefix",
)
def keep_prefix(
    host: Callable[..., None], cache: Any, req: Any, *, up_to: int, **kwargs: Any
) -> None:
    """Let FolderLinker keep the prefixes of a request that has ended."""
    host(cache, req, up_to=up_to, **kwargs)
    if cache.linker is not None and req.finished():
        from qwen3next_plugin.extras.fleet.sglang.folder_linker import FolderLinker

        linker = cache.linker.cache_linker
        if isinstance(linker, FolderLinker):
            # SGLang drops it when a hit is loaded, unless the prefix got into memory before that.
            cache.linker.hit_markers.pop(req.rid, None)
            linker.keep(cache, req.last_node)
