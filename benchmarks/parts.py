"""What a folder of benchmarks can measure, and which of it one command measures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from benchmarks.report import Record, Run, console
from benchmarks.worker import SGLANG_PYTHON

Name = TypeVar("Name", bound=Enum)


@dataclass(frozen=True, slots=True)
class Part:
    """One question or a few that are measured together."""

    measure: Callable[[Run], Iterator[Record]]
    in_quick: bool = True  # measured by --quick without --part
    needs_sglang: bool = False  # in its own environment


def measure(run: Run, parts: Mapping[Name, Part], only: Name | None = None) -> Iterator[Record]:
    """The records of one part, or of all that this machine can measure."""
    chosen = parts if only is None else {only: parts[only]}
    for name, part in chosen.items():
        if part.needs_sglang and not SGLANG_PYTHON.exists():
            console.print(f"{name.value}: left out, needs `make setup ENGINE=sglang`")
        elif only is None and run.quick and not part.in_quick:
            console.print(f"{name.value}: left out of --quick, ask for it by --part {name.value}")
        else:
            yield from part.measure(run)
