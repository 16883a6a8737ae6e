"""Control messages that fail are answered with an error, and do not end SGLang's scheduler.

Control messages are all messages to the scheduler except prompts: updates of weights, adapters,
sessions, profiles, pauses, settings.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import UnionType
from typing import Any, Union, get_origin

from qwen3next_plugin.engines.sglang.fatal import FatalError
from qwen3next_plugin.engines.sglang.names import logger
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.host_fixes.sglang.values import check_range

# Limit for the other ranks of a group to join, and for each of its collectives. Nothing is served
# meanwhile; torch's default is half an hour.
GROUP_TIME = timedelta(seconds=120)
MOST_SLEEP = 60.0  # seconds; SGLang sleeps before each step
PROMPTS = ("Tokenized", "BatchTokenized")  # prefixes of the other messages' names


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.Scheduler.init_request_dispatcher",
    reason="what goes wrong while SGLang's scheduler handles a control message ends it: an "
    "unknown group of ranks, a module that is not installed, memory that is in use",
    remove_when="SGLang answers an error, whatever the message",
)
def guard(host: Callable[[Any], None], scheduler: Any) -> None:
    """Wrap `init_request_dispatcher`: guard the handler of every control message."""
    host(scheduler)
    handlers = scheduler._request_dispatcher._mapping
    for kind, handler in handlers.items():
        if not kind.__name__.startswith(PROMPTS):
            handlers[kind] = partial(handle, handler, scheduler.tp_group)


def handle(handler: Callable[[Any], Any], ranks: Any, asked: Any) -> Any:
    """Run a handler. An exception, on any rank, is the message's answer.

    All ranks get the same messages in the same order. If a message has an answer, ranks exchange
    their errors, so that an error of one rank is not answered with success. If a rank fails before
    a collective of the handler, the others wait in it until gloo's timeout, which ends the server.
    A failure that leaves the model with weights of two checkpoints ends it, too.
    """
    answer = failed = None
    try:
        answer = handler(asked)
    except FatalError:
        raise
    except Exception as error:
        logger.exception("qwen3next_plugin: %s failed", type(asked).__name__)
        failed = f"{type(error).__name__}: {error}"
    kind = answer_type(asked)
    if kind is not None and ranks.world_size > 1:
        failed = next(filter(None, _from_all(failed, ranks)), None)
    if kind is None or failed is None:
        return answer
    return failure(kind, asked, failed)


def _from_all(failed: str | None, ranks: Any) -> list[str | None]:
    import torch.distributed as dist

    every: list[str | None] = [None] * ranks.world_size
    dist.all_gather_object(every, failed, group=ranks.cpu_group)
    return every


def answer_type(asked: Any) -> Any:
    """The type of the answer to a message; None where nobody waits for one."""
    from sglang.srt.managers import io_struct

    name = type(asked).__name__.removesuffix("Input")
    return getattr(io_struct, f"{name}Output", None)


def failure(kind: Any, asked: Any, text: str) -> Any:
    """An answer with the error in `rid`, which other answers to control messages leave empty."""
    from msgspec.structs import fields

    values = {field.name: _empty(field.type) for field in fields(kind) if field.required}
    values |= {name: getattr(asked, name) for name in values if hasattr(asked, name)}
    if "message" in values:
        values["message"] = text
    return kind(**values, rid=text)


def _empty(kind: Any) -> Any:
    """False, no text, an empty list or dict, or None where that is allowed."""
    made = get_origin(kind) or kind
    return None if made in (Union, UnionType) else made()


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.communicator.FanOutCommunicator.__call__",
    reason="some answers to control messages have no field for an error",
    remove_when="SGLang answers an error, whatever the message",
)
async def raise_failures(
    host: Callable[[Any, Any], Awaitable[list[Any]]], communicator: Any, asked: Any
) -> list[Any]:
    """Wrap `FanOutCommunicator.__call__`, by which the server waits for the schedulers' answers.

    Raises:
        HTTPException: a handler failed. SGLang's routes would report success for some failures.
    """
    from fastapi import HTTPException

    answers = await host(communicator, asked)
    for answer in answers:
        if answer.rid:
            raise HTTPException(400, answer.rid)
    return answers


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager."
    "_start_profile",
    "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager."
    "_stop_profile",
    "sglang.srt.managers.scheduler_components.profiler_manager.SchedulerProfilerManager."
    "_profile_batch_predicate",
    reason="a profile that cannot begin or be written ends SGLang's scheduler, in a later step too",
    remove_when="SGLang ends the profile instead",
)
def end_profile(host: Callable[..., Any], profiler: Any, *args: Any, **more: Any) -> Any:
    """Wrap what starts, counts and stops a profile, also in later steps: end a failed one."""
    from sglang.srt.managers.io_struct import ProfileReqOutput

    try:
        return host(profiler, *args, **more)
    except Exception as error:
        logger.exception("qwen3next_plugin: the profile has failed, and is over")
        group, tracer = profiler.dp_tp_cpu_group, vars(profiler).get("torch_profiler")
        if tracer is not None:
            with suppress(Exception):
                tracer.stop()
        profiler.__post_init__()
        profiler.dp_tp_cpu_group = group
        text = f"{type(error).__name__}: {error}"
        return ProfileReqOutput(success=False, message=text, rid=text)


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "resume_memory_occupation",
    reason="SGLang forgets what else was released where it is asked to resume more than that",
    remove_when="SGLang resumes what was released",
)
def resume_memory(host: Callable[..., Any], updater: Any, asked: Any) -> Any:
    """Wrap the scheduler's `resume_memory_occupation`: take back what was released."""
    from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
    from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqOutput

    tags = dict.fromkeys(asked.tags or GPU_MEMORY_ALL_TYPES)
    asked.tags = [tag for tag in tags if tag in updater.offload_tags]
    return host(updater, asked) if asked.tags else ResumeMemoryOccupationReqOutput()


@patch(
    When.WITH_OURS,
    "sglang.srt.model_executor.model_runner_components.weight_exporter.init_custom_process_group",
    "sglang.srt.model_executor.model_runner_components.weight_updater.init_custom_process_group",
    reason="a wrong address or rank of a group for weights stops the server for half an hour",
    remove_when="SGLang waits for other ranks beside its steps",
)
def wait_for_ranks(host: Callable[..., Any], *args: Any, **more: Any) -> Any:
    """Wrap `init_custom_process_group`: give up on ranks that do not join in time."""
    return host(*args, **{"timeout": GROUP_TIME} | more)


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.Scheduler.slow_down",
    reason="a sleep that is too long for a clock ends SGLang's scheduler in the next step",
    remove_when="SGLang limits it",
)
def slow_down(host: Callable[..., Any], scheduler: Any, asked: Any) -> Any:
    """Wrap the scheduler's `slow_down`: limit the seconds, since too many for a clock end it."""
    check_range("forward_sleep_time", asked.forward_sleep_time, float("-inf"), MOST_SLEEP)
    return host(scheduler, asked)


@patch(
    When.WITH_OURS,
    "sglang.srt.utils.request_logger.RequestLogger.configure",
    reason="after a log level that SGLang does not know, every request is answered with a 500",
    remove_when="SGLang checks it first",
)
def configure_or_keep(host: Callable[..., None], log: Any, *args: Any, **more: Any) -> None:
    """Wrap `RequestLogger.configure`: undo a setting that fails; SGLang would fail all requests.

    Raises:
        HTTPException: says what is wrong with it; the log is as before.
    """
    from fastapi import HTTPException

    before = dict(vars(log))
    try:
        host(log, *args, **more)
    except Exception as error:
        vars(log).update(before)
        raise HTTPException(400, f"{type(error).__name__}: {error}") from error
