"""Cleans up what a server would leave behind at its end."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch

LOADS = "sglang_loads_qwen3next_*.shm"  # in /dev/shm: how busy each engine is
_paths: set[Path] = set()  # of those files whose names this process has asked for


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.load_snapshot.shm_path_for",
    reason="each server leaves 16 KB in /dev/shm, by a name that no later start can call ours",
    remove_when="SGLang removes the file",
)
def mark_loads(host: Callable[[str], str], ipc_name: str) -> str:
    """Around `shm_path_for`: a name by which a later start knows our file."""
    folder, name = os.path.split(host(ipc_name))
    path = os.path.join(folder, name.replace("sglang_loads_", "sglang_loads_qwen3next_", 1))
    _paths.add(Path(path))
    return path


@patch(
    When.WITH_OURS,
    "sglang.srt.entrypoints.http_server.launch_server",
    reason="Ctrl-C ends SGLang in a traceback, and leaves the file above",
    remove_when="it ends without either",
)
def end_quietly(host: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Around `launch_server`: Ctrl-C is no error, and nothing stays in /dev/shm."""
    try:
        host(*args, **kwargs)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # as shells name the signal
    finally:
        for path in _paths:  # the schedulers still write them, and are killed next
            path.unlink(missing_ok=True)


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.scheduler.configure_scheduler_process",
    "sglang.srt.managers.detokenizer_manager.DetokenizerManager.event_loop",
    "sglang.srt.managers.data_parallel_controller.DataParallelController.event_loop",
    reason="Ctrl-C ends these processes, too: each in a traceback",
    remove_when="SGLang's processes leave SIGINT to the server",
)
def ignore_ctrl_c(host: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around what each begins with: ignore Ctrl-C, after which the server kills it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return host(*args, **kwargs)
