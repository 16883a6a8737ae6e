"""The platform that SGLang runs on where there is no GPU: its own CPU, with defaults that serve."""

import logging
from typing import Any

from sglang.srt.platforms.cpu import CpuSRTPlatform

from qwen3next_plugin.engines.sglang.machine import ATTENTION_BACKEND, HOST_BACKEND, without_gpu

logger = logging.getLogger("sglang.qwen3next_plugin")


class CpuPlatform(CpuSRTPlatform):
    """SGLang's CPU."""

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what was not asked for, and say so."""
        chosen = {
            name: value
            for name, unset, value in (
                ("attention_backend", (None, HOST_BACKEND), ATTENTION_BACKEND),
                ("mamba_radix_cache_strategy", ("auto",), "no_buffer"),
                ("disable_overlap_schedule", (False,), True),
            )
            if getattr(server_args, name) in unset
        }
        for name, value in chosen.items():
            setattr(server_args, name, value)
        flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in chosen.items())
        logger.info("qwen3next_plugin: no GPU; defaults %s", flags)


def activate() -> str | None:
    """Entry point `sglang.srt.platforms`: our CPU, unless there is something better."""
    return f"{__name__}:CpuPlatform" if without_gpu() else None
