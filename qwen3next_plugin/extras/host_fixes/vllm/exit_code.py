"""Makes a server end, with an error code, when its engine has ended."""

from collections.abc import Callable, Coroutine
from typing import Any

from qwen3next_plugin.engines.vllm.patches import When, patch

LEFT = 3  # seconds for connections to close, when no engine is left to answer


@patch(
    When.IN_SERVER,
    "vllm.entrypoints.launchers.api_server.entry.build_and_serve",
    reason="a server whose engine has ended exits with 0; after SIGTERM it may "
    "wait for ever for a stream to end",
    remove_when="vLLM exits with another code, and gives connections a time to close",
    upstream="https://github.com/vllm-project/vllm/issues/48966",
)
async def fail_with_the_engine(
    host: Callable[..., Coroutine[Any, Any, Any]], engine_client: Any, *args: Any, **kwargs: Any
) -> Any:
    """Around `build_and_serve`: fail if the server ends because its engine has ended.

    vLLM would exit with 0, so a supervisor would not restart it. It would also wait for streaming
    clients, sometimes forever, because the end of a stream may get lost.
    """
    kwargs.setdefault("timeout_graceful_shutdown", LEFT)  # uvicorn's
    stop, told = engine_client.shutdown, False

    def shutdown(*args: Any, **kwargs: Any) -> None:
        """By SIGTERM or Ctrl-C, while requests are served."""
        nonlocal told
        told = True
        stop(*args, **kwargs)

    engine_client.shutdown = shutdown
    ended = await host(engine_client, *args, **kwargs)
    if engine_client.errored and not told:
        ended.close()  # a coroutine that need not run
        raise SystemExit("The engine has ended, and so does the server; the log above says why")
    return ended
