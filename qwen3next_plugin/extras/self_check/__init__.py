"""Before a model loads, its kernels are compared with their references; `doctor` shows it."""

from typing import TYPE_CHECKING

from qwen3next_plugin.engines.extras import Additions, Log

if TYPE_CHECKING:
    import torch

    from qwen3next_plugin.config import Qwen3NextConfig
    from qwen3next_plugin.model.state import PageLayout


def check(config: "Qwen3NextConfig", page: "PageLayout", device: "torch.device", log: Log) -> None:
    """As `check_kernels`, which is imported when a model is made."""
    from qwen3next_plugin.extras.self_check.checking import check_kernels

    check_kernels(config, page, device, log)


ADDS = Additions(before_load=check)
