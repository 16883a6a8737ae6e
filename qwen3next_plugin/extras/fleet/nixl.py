"""NIXL beside computation on a CPU, for the engines that hand requests over by it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAIT = 100_000  # µs that NIXL's thread waits for data before it looks anyway


@contextmanager
def waiting(bindings: Any) -> Iterator[None]:
    """While an agent is made by NIXL's `bindings`: let its thread wait for data.

    NIXL's own waits 0 µs, and again, so it keeps a core busy; it wakes as early if it may wait
    longer. Remove when NIXL waits.
    """
    agent = bindings.nixlAgent

    def made(name: str, config: Any) -> Any:
        config.pthrDelay = WAIT
        return agent(name, config)

    bindings.nixlAgent = made
    try:
        yield
    finally:
        bindings.nixlAgent = agent
