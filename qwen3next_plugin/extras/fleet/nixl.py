"""Keeps NIXL's thread from using a core, for engines that hand requests over on CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAIT = 100_000  # µs for which NIXL's thread waits for data


@contextmanager
def waiting(bindings: Any) -> Iterator[None]:
    """Within this context agents of NIXL's `bindings` get a thread that waits for data.

    NIXL's default timeout is 0 µs, so its thread polls and keeps a core busy. With a longer one it
    wakes as early. Remove when NIXL waits.
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
