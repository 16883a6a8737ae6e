"""What self-checks found on this machine, kept between starts; imports no torch."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Self

from qwen3next_plugin.config.errors import is_number
from qwen3next_plugin.kept import all_kept, keep

FOLDER = "self-check"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One self-check: where, of what, when, and the error, which is empty if all kernels agree."""

    device: str
    kernels: str
    key: str  # a hash of all that decides what the kernels compute
    at: str  # ISO 8601, UTC
    seconds: float
    error: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for what was not kept by `keep`."""
        words = (self.device, self.kernels, self.key, self.at, self.error)
        if not all(isinstance(word, str) for word in words) or not is_number(self.seconds):
            raise ValueError(f"no verdict: {self}")
        if datetime.fromisoformat(self.at).tzinfo is None:
            raise ValueError(f"{self.at} has no time zone")

    @classmethod
    def now(cls, subject: Mapping[str, str], seconds: float, error: str = "") -> Self:
        at = datetime.now(UTC).isoformat("T", "seconds")
        return cls(subject["device"], subject["kernels"], key_of(subject), at, seconds, error)

    @property
    def age(self) -> str:
        """How long ago, in the largest fitting unit."""
        seconds = (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds()
        for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
            if (n := int(seconds // size)) > 0:
                return f"{n} {unit}{'s' if n > 1 else ''} ago"
        return "just now"

    def keep(self) -> None:
        """Write it."""
        keep(f"{FOLDER}/{self.key}", asdict(self))


def key_of(subject: Mapping[str, str]) -> str:
    """The name of a subject's verdict."""
    return hashlib.sha256(json.dumps(dict(subject), sort_keys=True).encode()).hexdigest()[:16]


def passed(subject: Mapping[str, str]) -> bool:
    """Whether all kernels of this subject have agreed before."""
    return any(v.key == key_of(subject) and not v.error for v in kept())


def kept() -> Iterator[Verdict]:
    """All verdicts of this machine, the latest last; files that are not verdicts are skipped."""
    found = []
    for fields in all_kept(FOLDER):
        with suppress(TypeError, ValueError):
            found.append(Verdict(**fields))
    yield from sorted(found, key=lambda verdict: verdict.at)
