"""Cleans up what a server would leave behind at its end."""

import os
from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.machine.leftovers import remove_own

LOADS = "sglang_loads_qwen3next_*.shm"  # in /dev/shm: how busy each engine is


@patch(
    When.WITH_OURS,
    "sglang.srt.managers.load_snapshot.shm_path_for",
    reason="each server leaves 16 KB in /dev/shm, by a name that no later start can call ours",
    remove_when="SGLang removes the file",
)
def mark_loads(host: Callable[[str], str], ipc_name: str) -> str:
    """Around `shm_path_for`: a name by which a later start knows our file."""
    folder, name = os.path.split(host(ipc_name))
    return os.path.join(folder, name.replace("sglang_loads_", "sglang_loads_qwen3next_", 1))


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
        remove_own(LOADS)
