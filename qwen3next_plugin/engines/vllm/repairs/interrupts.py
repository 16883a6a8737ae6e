"""SIGTERM and Ctrl-C while the engine loads."""

from collections.abc import Callable
from typing import Any


def end_while_loading(host: Callable[..., None], *args: Any) -> None:
    """Wrap `wait_for_engine_startup`: both end the server, and its engine with it.

    vLLM turns them into a KeyboardInterrupt, which the socket around this call swallows: the server
    goes on loading, and serves.
    """
    try:
        host(*args)
    except KeyboardInterrupt:
        raise SystemExit("The server was told to end while its engine loaded") from None
