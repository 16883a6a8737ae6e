"""A patch stands beside its function: a decorator collects an engine's patches in one table."""

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from qwen3next_plugin.engines import patching
from qwen3next_plugin.engines.patching import Entry, Function, Host, Patch, Replacement

T = TypeVar("T", bound=Callable[..., Any])


class Table:
    """All patches of a host. `signatures`: a generated file, by the host's oldest version."""

    def __init__(self, versions: str, signatures: Path) -> None:
        self.entries: list[Entry] = []
        self.signatures: dict[str, list[str]] = json.loads(signatures.read_text("utf-8"))
        self._versions = versions
        self._applied: set[Enum] = set()

    def patch(
        self,
        group: Enum,
        *targets: str,
        reason: str,
        remove_when: str,
        upstream: str = "",
        kind: type[Patch] | type[Replacement] = Patch,
    ) -> Callable[[T], T]:
        """Put the decorated function in the place of each target when `group` is applied."""

        def declare(function: T) -> T:
            for target in targets:
                self._add(
                    kind(
                        target=target,
                        parameters=self._signature(target),
                        function=function,
                        group=group,
                        reason=reason,
                        remove_when=remove_when,
                        upstream=upstream,
                    ),
                    function.__module__,
                )
            return function

        return declare

    def add(self, *entries: Entry) -> None:
        """Add attributes and items, declared by the calling module."""
        for entry in entries:
            self._add(entry, sys._getframe(1).f_globals["__name__"])

    def apply(
        self,
        groups: Iterable[Enum],
        host: Host,
        put: Callable[[Sequence[Function]], None] = patching.wrap,
    ) -> None:
        """Check and apply all entries of these groups that this process has not applied yet."""
        new = set(groups) - self._applied
        patching.apply([entry for entry in self.entries if entry.group in new], host, put)
        self._applied |= new

    def _add(self, entry: Entry, module: str) -> None:
        self.entries.append(replace(entry, versions=self._versions, module=module))

    def _signature(self, target: str) -> tuple[str, ...] | None:
        found = self.signatures.get(target)
        return None if found is None else tuple(found)
