"""How long the parts of `make test` and their files take.

    python tests/durations.py    write durations.json and docs/testing.md, from build/durations

`make test` leaves its times in build/durations.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
TIMES, PAGE = ROOT / "tests" / "durations.json", ROOT / "docs" / "testing.md"
TABLES = re.compile(r"(?<=<!-- durations -->\n).*?(?=<!-- end of durations -->)", re.DOTALL)
LONGEST = 12  # files in the page
LEAST = 1.0  # seconds of a file that is listed


@dataclass
class Durations:
    """A plugin of pytest: writes the seconds of all files, by all workers together."""

    path: Path
    began: float = field(default_factory=perf_counter)
    seconds: Counter[str] = field(default_factory=Counter)
    tests: int = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid.partition("::")[0]] += report.duration
        self.tests += report.when == "call"

    def pytest_sessionfinish(self) -> None:
        files = {name: round(s, 1) for name, s in self.seconds.most_common() if s >= LEAST}
        whole = round(perf_counter() - self.began)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps({"seconds": whole, "tests": self.tests, "files": files}))


def tables(times: Mapping[str, Any]) -> str:
    """Those of docs/testing.md."""
    seconds: Counter[str] = Counter()
    for part in times["parts"].values():
        seconds.update(part["files"])
    rows = [
        *(f"| {name} | {_minutes(s)} | |" for name, s in times["setup"].items()),
        *(
            f"| {n} | {_minutes(p['seconds'])} | {p['tests']:,} |"
            for n, p in times["parts"].items()
        ),
    ]
    files = [f"| `{name}` | {_minutes(s)} |" for name, s in seconds.most_common(LONGEST)]
    return "\n".join(
        [
            *("| phase | min:s | tests |", "|---|---|---|", *rows, ""),
            *("| longest files, all their processes | min:s |", "|---|---|", *files, ""),
            f"*{times['machine']}*\n",
        ]
    )


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


def _setup() -> dict[str, float]:
    """Seconds of `make setup`, which makes both environments side by side."""
    first, last = (
        [(ROOT / f".venv-{engine}" / name).stat().st_mtime for engine in ("vllm", "sglang")]
        for name in ("pyvenv.cfg", ".plugin")
    )
    return {"setup, and lint beside it": max(last) - min(first)}


def main() -> None:
    sys.path.append(str(ROOT))  # a script's own folder is the only one there
    from benchmarks.origin import origin

    parts = {
        f"{engine}, {part}": json.loads(
            (ROOT / f"build/durations/{engine}-{part}.json").read_text()
        )
        for engine in ("vllm", "sglang")
        for part in ("rest", "serve")
    }
    of = origin("")
    machine = "; ".join(of[key] for key in ("processor", "flags", "cores"))
    times = {"machine": machine, "setup": _setup(), "parts": parts}
    TIMES.write_text(json.dumps(times, indent=1) + "\n")
    PAGE.write_text(TABLES.sub(lambda _: tables(times), PAGE.read_text("utf-8")))


if __name__ == "__main__":
    main()
