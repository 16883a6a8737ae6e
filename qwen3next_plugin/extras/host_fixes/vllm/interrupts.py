"""How a server ends by SIGTERM and Ctrl-C, while its engine loads and while it serves."""

import atexit
import gc
import signal
from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.vllm.patches import When, patch

CLEAN_UP = 30  # seconds, at most: a busy machine has taken 16


@patch(
    When.CONFIGURED,
    "vllm.v1.engine.utils.wait_for_engine_startup",
    reason="vLLM ignores SIGTERM and Ctrl-C while the engine loads",
    remove_when="zmq_socket_ctx no longer swallows a KeyboardInterrupt (`compat`)",
)
def end_while_loading(host: Callable[..., None], *args: Any) -> None:
    """Wrap `wait_for_engine_startup`: let both signals end the server and its engine.

    vLLM turns them into a KeyboardInterrupt, which the socket around this call swallows, so that
    the server goes on loading, and serves.
    """
    try:
        host(*args)
    except KeyboardInterrupt:
        raise SystemExit("The server was told to end while its engine loaded") from None


@patch(
    When.IN_ENGINE,
    "vllm.v1.engine.core.EngineCoreProc.run_busy_loop",
    "vllm.v1.engine.core.DPEngineCoreProc.run_busy_loop",
    reason="Ctrl-C ends the engine, too: in an order that leaves shared memory",
    remove_when="vLLM's processes leave SIGINT to the server",
)
@patch(
    When.IN_WORKER,
    "vllm.v1.executor.multiproc_executor.WorkerProc.worker_busy_loop",
    reason="Ctrl-C ends the workers, too: in an order that leaves shared memory",
    remove_when="vLLM's processes leave SIGINT to the server",
)
def let_the_server_end_it(host: Callable[..., None], process: Any) -> None:
    """Around the loops of engine and worker: they ignore Ctrl-C, which ends the server alone.

    A terminal sends SIGINT to all processes of the server. The server's SIGTERM would then end an
    engine that is cleaning up, and a worker that ends before its engine looks like a failure.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host(process)


@patch(
    When.CONFIGURED,
    "vllm.v1.engine.utils.CoreEngineProcManager.shutdown",
    reason="vLLM kills its engine right after SIGTERM: two shared memory objects are left",
    remove_when="vLLM gives an engine time to end where --shutdown-timeout is 0",
    upstream="https://github.com/vllm-project/vllm/pull/52281",
)
def give_time_to_end(host: Callable[..., None], manager: Any, timeout: float | None = None) -> None:
    """Around `CoreEngineProcManager.shutdown`: give the engine time to clean up.

    Args:
        timeout: seconds that requests have, as --shutdown-timeout: 0 by default.
    """
    host(manager, timeout or CLEAN_UP)


@patch(
    When.IN_SERVER,
    "vllm.entrypoints.launchers.utils.server_utils.freeze_gc_heap",
    reason="a server ends with Triton's list of what it has leaked",
    remove_when="vLLM unfreezes what it froze for its server, as for its engine",
)
def thaw_at_exit(host: Callable[[], None]) -> None:
    """Around a server's `freeze_gc_heap`: unfreeze at exit, so that objects are freed.

    Otherwise Triton reports them as leaks, in thirty lines.
    """
    host()
    atexit.register(gc.unfreeze)
