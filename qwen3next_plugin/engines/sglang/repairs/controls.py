"""Endpoints that control a server: what cannot be done is refused, and ends no scheduler."""

from collections.abc import Awaitable, Callable
from typing import Any

from qwen3next_plugin.engines.sglang.names import logger

IDLE = "memory is released only while no request runs or waits"


async def record_experts(host: Callable[[Any], Awaitable[None]], manager: Any) -> None:
    """Wrap `start_`, `stop_` and `dump_expert_distribution_record` of the tokenizer manager.

    Raises:
        HTTPException: nothing records; SGLang's route catches no other error.
    """
    from fastapi import HTTPException
    from sglang.srt.runtime_context import get_exec

    if get_exec().moe.expert_distribution_recorder_mode is None:
        raise HTTPException(400, "the server has no --expert-distribution-recorder-mode")
    await host(manager)


async def release_if_idle(
    host: Callable[..., Awaitable[None]], manager: Any, obj: Any, request: Any = None
) -> None:
    """Wrap the tokenizer manager's `release_memory_occupation`.

    Raises:
        ValueError: it has requests, and generation is not paused.
    """
    if manager.rid_to_state and not manager.is_pause:
        raise ValueError(f"{IDLE}; wait, or use /pause_generation")
    await host(manager, obj, request)


def release_memory(host: Callable[..., Any], updater: Any, asked: Any) -> Any:
    """Wrap the scheduler's `release_memory_occupation`: keep the memory if a request has come."""
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqOutput

    paused = updater.scheduler is not None and updater.scheduler._engine_paused
    if updater.is_fully_idle(ignore_waiting=paused):
        return host(updater, asked)
    logger.error("qwen3next_plugin: nothing is released: %s", IDLE)
    return ReleaseMemoryOccupationReqOutput()


def resume_memory(host: Callable[..., Any], updater: Any, asked: Any) -> Any:
    """Wrap the scheduler's `resume_memory_occupation`: take back what was released."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    tags = dict.fromkeys(asked.tags or GPU_MEMORY_ALL_TYPES)
    asked.tags = [tag for tag in tags if tag in updater.offload_tags]
    return host(updater, asked) if asked.tags else ResumeMemoryOccupationReqOutput()
