"""Tells images with equal pixels but different shapes apart."""

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from qwen3next_plugin.engines.sglang.names import serves_ours
from qwen3next_plugin.engines.sglang.patches import When, patch

GRIDS = ("image_grid_thw", "video_grid_thw")  # how many patches there are in each direction


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.schedule_batch.MultimodalDataItem.set_pad_value",
    reason="an image is found in caches by its patches alone, which another shape may share",
    remove_when="SGLang hashes the grid, too",
)
def name_with_its_shape(host: Callable[..., None], item: Any) -> None:
    """Around `set_pad_value`: include the shape in an image's name in caches.

    SGLang hashes only the patches. A one-coloured picture and the same one on its side have equal
    patches, but different positions.
    """
    named = item.pad_value is not None or item.hash is not None
    host(item)
    grids = [item.model_specific_data.get(name) for name in GRIDS]
    if not named and any(grid is not None for grid in grids) and serves_ours():
        shapes = [None if grid is None else grid.tolist() for grid in grids]
        both = sha256(f"{item.hash} {shapes}".encode()).digest()
        item.set_hash(int.from_bytes(both[:8], byteorder="big"))
