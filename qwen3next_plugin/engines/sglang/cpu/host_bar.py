"""SGLang's bar of a checkpoint's files, which is hidden where ours counts bytes."""

from typing import Any

from tqdm.auto import tqdm

from qwen3next_plugin.model.checkpoint import progress


class HostBar(tqdm):
    """What SGLang's loaders show files with."""

    def __init__(self, *args: Any, disable: bool | None = False, **kwargs: Any) -> None:
        super().__init__(*args, disable=disable or progress.is_shown(), **kwargs)
