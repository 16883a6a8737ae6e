"""`qwen3next watch`: what steps and drafts do in a server, by its metrics every second."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3next_plugin.extras.command_line.metrics_page import Reading, read

if TYPE_CHECKING:
    from rich.table import Table

EVERY_S, WINDOW_S = 1, 10
BAR_WIDTH = 30
UNKNOWN = "–"


def watch(
    url: Annotated[str, typer.Argument(help="The server's address: http://localhost:8000")],
) -> None:
    """Show what steps and drafts do in a running server, until Ctrl-C.

    Acceptance of each draft position, given that those before it were accepted; tokens drafted
    per request and step; the speed; the longest step of the last minute; what runs. "Now" is the
    last ten seconds. To a pipe, or a terminal without a cursor, it prints the values of one second,
    tab-separated, and ends.
    """
    from rich.console import Console

    address = url if "://" in url else f"http://{url}"
    address = f"{address.rstrip('/').removesuffix('/metrics')}/metrics"
    readings = deque([read(address)], maxlen=WINDOW_S // EVERY_S + 1)
    if sys.stdout.isatty() and not Console().is_dumb_terminal:
        with contextlib.suppress(KeyboardInterrupt):
            _show(address, readings)
        return
    time.sleep(EVERY_S)
    readings.append(read(address))
    for figure in figures(readings):
        typer.echo(f"{figure.name}\t{figure.now}\t{figure.total}")


def _show(address: str, readings: deque[Reading]) -> None:
    """Draw the report in the terminal every second."""
    from rich.live import Live

    with Live(table(address, readings), auto_refresh=False) as live:
        while True:
            time.sleep(EVERY_S)
            readings.append(read(address))
            live.update(table(address, readings), refresh=True)


def table(address: str, readings: Sequence[Reading]) -> "Table":
    """The report, with bars for shares."""
    from rich.bar import Bar
    from rich.table import Column, Table
    from rich.text import Text

    last = readings[-1]
    right = [Column(name, justify="right") for name in ("now", "since start")]
    report = Table("", "", Column(width=BAR_WIDTH), *right, box=None, title_justify="left")
    # The server's names are text, not markup.
    report.title = Text(
        f"{last.engine.name}, {last.model}, {address.removesuffix('/metrics')}", "table.title"
    )
    previous = ""
    for figure in figures(readings):
        bar = "" if figure.share is None else Bar(1, 0, figure.share, width=BAR_WIDTH)
        section = "" if figure.section == previous else figure.section
        report.add_row(section, Text(figure.label), bar, figure.now, figure.total)
        previous = figure.section
    return report


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the report."""

    section: str
    label: str
    now: str
    total: str = ""  # since the server started
    share: float | None = None  # of a bar

    @property
    def name(self) -> str:
        return f"{self.section} {self.label}".strip()


def figures(readings: Sequence[Reading]) -> Iterator[Figure]:
    """The lines of the report on what happened from the first reading to the last."""
    first, last = readings[0], readings[-1]
    drafts = bool(last.by("drafts_verified_total", "position"))
    if drafts:
        yield from _acceptance(first, last)
        yield from _draft_lengths(first, last)
    yield from _speed(first, last)
    if drafts:
        yield _time_in_drafts(first, last)
    longest = last.most("qwen3next_longest_step_seconds")
    yield Figure("longest step", "", UNKNOWN if longest is None else f"{longest:.2f} s")
    for label, name in (("running", last.engine.running), ("waiting", last.engine.waiting)):
        yield Figure("requests", label, _text(last.value(name)))
    yield Figure("state pages", "", _text(last.value("qwen3next_state_pages")))


def _acceptance(first: Reading, last: Reading) -> Iterator[Figure]:
    verified, accepted = "drafts_verified_total", "drafts_accepted_total"
    tried, right = last.by(verified, "position"), last.by(accepted, "position")
    new_tried, new_right = (_new(first, last, name, "position") for name in (verified, accepted))
    for position in tried:
        now = _ratio(new_right[position], new_tried[position])
        total = _ratio(right[position], tried[position])
        yield Figure("acceptance", f"draft {position}", _percent(now), _percent(total), now)


def _draft_lengths(first: Reading, last: Reading) -> Iterator[Figure]:
    total, before = _counts(last), _counts(first)
    new = {length: total[length] - before[length] for length in total}
    for length in total:
        now = _ratio(new[length], sum(new.values()))
        share = _ratio(total[length], sum(total.values()))
        yield Figure("draft length", str(length), _percent(now), _percent(share), now)


def _counts(reading: Reading) -> dict[int, float]:
    """Rows by draft length, from the cumulative buckets of the histogram."""
    buckets = reading.by("draft_length_bucket", "le")
    bounds = sorted(int(float(bound)) for bound in buckets if bound != "+Inf")
    cumulative = [buckets[f"{bound}.0"] for bound in bounds]
    return {n: c - b for n, c, b in zip(bounds, cumulative, [0, *cumulative], strict=False)}


def _speed(first: Reading, last: Reading) -> Iterator[Figure]:
    for label, (name, mode) in (
        ("answers", last.engine.generated),
        ("prompts", last.engine.prompt),
    ):
        labels = {"mode": mode} if mode else {}
        total, before = last.value(name, **labels), first.value(name, **labels)
        gained = None if total is None else total - (before or 0)
        rate = None if gained is None else _ratio(gained, last.seconds - first.seconds)
        yield Figure("tokens a second", label, _text(rate), f"{_text(total)} in all")


def _time_in_drafts(first: Reading, last: Reading) -> Figure:
    now, total = (
        _ratio(seconds["draft"] + seconds["catch_up"], sum(seconds.values()))
        for seconds in (
            _new(first, last, "seconds_total", "kind"),
            last.by("seconds_total", "kind"),
        )
    )
    return Figure("decoding time", "in drafts", _percent(now), _percent(total), now)


def _new(first: Reading, last: Reading, name: str, label: str) -> dict[str, float]:
    """What a counter gained between two readings, by a label."""
    before = first.by(name, label)
    return {value: number - before[value] for value, number in last.by(name, label).items()}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.0%}"


def _text(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:,.0f}"
