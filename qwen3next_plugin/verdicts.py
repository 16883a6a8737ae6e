"""What self-checks found on this machine, kept between starts; imports no torch."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

FOLDER = Path("qwen3next_plugin", "self-check")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One self-check: where, of what, when, and the error, which is empty if all kernels agree."""

    device: str
    kernels: str
    key: str  # a hash of all that decides what the kernels compute
    at: str  # ISO 8601, UTC
    seconds: float
    error: str = ""

    @classmethod
    def now(cls, subject: Mapping[str, str], seconds: float, error: str = "") -> Self:
        at = datetime.now(UTC).isoformat("T", "seconds")
        return cls(subject["device"], subject["kernels"], key_of(subject), at, seconds, error)

    @property
    def age(self) -> str:
        """How long ago, in the largest fitting unit."""
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds()
        for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if n := int(seconds // size):
                return f"{n} {unit}{'s' if n > 1 else ''} ago"
        return "just now"

    def keep(self) -> None:
        """Write it. Where nothing can be written, the next start checks again."""
        with suppress(OSError, RuntimeError):  # RuntimeError: there is no home
            folder = _folder()
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{self.key}.{os.getpid()}"
            part.write_text(json.dumps(asdict(self)))
            part.replace(folder / f"{self.key}.json")


def key_of(subject: Mapping[str, str]) -> str:
    """The name of a subject's verdict."""
    return hashlib.sha256(json.dumps(dict(subject), sort_keys=True).encode()).hexdigest()[:16]


def passed(subject: Mapping[str, str]) -> bool:
    """Whether all kernels of this subject have agreed before."""
    return any(v.key == key_of(subject) and not v.error for v in kept())


def kept() -> Iterator[Verdict]:
    """All verdicts of this machine, the latest last; files that are not verdicts are skipped."""
    found = []
    with suppress(OSError, RuntimeError):
        for file in _folder().glob("*.json"):
            with suppress(OSError, ValueError, TypeError):
                found.append(Verdict(**json.loads(file.read_text())))
    yield from sorted(found, key=lambda verdict: verdict.at)


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / FOLDER
