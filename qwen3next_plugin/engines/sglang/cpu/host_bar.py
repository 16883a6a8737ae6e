"""Hides SGLang's progress bar of checkpoint files where ours counts bytes."""

from typing import Any

from tqdm.auto import tqdm

from qwen3next_plugin.engines.patching import Attribute
from qwen3next_plugin.engines.sglang.patches import TABLE, When
from qwen3next_plugin.model.checkpoint import progress


class HostBar(tqdm):
    """What SGLang's loaders show files with."""

    def __init__(self, *args: Any, disable: bool | None = False, **kwargs: Any) -> None:
        super().__init__(*args, disable=disable or progress.is_shown(), **kwargs)


TABLE.add(
    Attribute(
        target="sglang.srt.model_loader.weight_utils.tqdm",
        value=HostBar,
        group=When.ON_CPU,
        reason="SGLang's bar counts files, stands still for minutes in a large one, and would run "
        "beside ours",
        remove_when="SGLang has a flag that hides its bar",
    )
)
