"""Pictures of docs/, drawn from records."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from benchmarks.report import Record

CLIENTS = re.compile(r"(.+), (\d+)")  # a row's case, and how many
CONTEXT = re.compile(r"(prefill|decode), ([\d,]+)")  # a row of claim/factors
OURS, LINE = "#4c72b0", "#c44e52"


def speeds(axes: Any, records: Sequence[Record]) -> None:
    """Bars: how many times as fast as upstream the plugin is."""
    (record,) = records
    rows = {name: row["upstream / plugin"] for name, row in record.rows.items()}
    bars = axes.barh(list(rows), list(rows.values()), color=OURS)
    axes.bar_label(bars, fmt="%.2f×", padding=3)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times upstream's speed")


def clients(axes: Any, records: Sequence[Record]) -> None:
    """Lines: answers with MTP over those without, by clients; bars are the rounds' range."""
    styles, colours = {"vLLM": "-", "SGLang": "--"}, dict[str, str]()
    axes.axhline(1, color="#333333", linewidth=1)
    for record in records:
        engine, ranges = record.units
        points = {m[2]: row for n, row in record.rows.items() if (m := CLIENTS.fullmatch(n))}
        if not points:
            continue
        case = CLIENTS.fullmatch(next(iter(record.rows)))[1]
        ratios = [row[engine] for row in points.values()]
        ends = [[float(end) for end in row[ranges].split("–")] for row in points.values()]
        axes.errorbar(
            [int(n) for n in points],
            ratios,
            [[abs(r - e[i]) for r, e in zip(ratios, ends, strict=True)] for i in (0, 1)],
            color=colours.setdefault(case, f"C{len(colours)}"),
            linestyle=styles[engine],
            marker="o",
            markersize=3,
            elinewidth=0.8,
            label=f"{engine}, {case}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 8, 16, 48], ["1", "4", "8", "16", "48"])
    axes.set_xlabel("clients")
    axes.set_ylabel("times the speed without MTP")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def claim(axes: Any, records: Sequence[Record]) -> None:
    """Lines: how many times as fast Qwen3-Next is, by context; crosses: what is published."""
    (record,) = records
    rows = {m.groups(): row for name, row in record.rows.items() if (m := CONTEXT.fullmatch(name))}
    axes.axhline(1, color="#333333", linewidth=1)
    for what, colour in (("prefill", OURS), ("decode", LINE)):
        points = {n: row for (name, n), row in rows.items() if name == what}
        times = [row["times"] for row in points.values()]
        axes.plot(list(points), times, "o-", color=colour, label=what)
        said = {n: row["published"] for n, row in points.items() if row["published"]}
        times = [float(cell.split()[-1]) for cell in said.values()]  # "over 10" is drawn at 10
        axes.plot(list(said), times, "x", color=colour, label=f"{what}, published")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("times Qwen3-32B's speed")
    axes.legend(frameon=False)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a page calls it, the records that it shows, and how they are drawn."""

    says: str
    names: str
    size: tuple[float, float]
    draw: Callable[[Any, Sequence[Record]], None]

    def of(self, records: Sequence[Record]) -> list[Record]:
        return [record for record in records if PurePath(record.name).match(self.names)]


ALL = {
    "performance": Picture("upstream and plugin", "engines/steps", (7, 2.6), speeds),
    "mtp-clients": Picture("with MTP over without", "mtp/over_off/*/*", (7.5, 4), clients),
    "claim": Picture("by context", "claim/factors", (6.5, 3.6), claim),
}


def links(records: Sequence[Record]) -> list[str]:
    """Links to the pictures of these records."""
    return [f"![{p.says}]({name}.svg)\n" for name, p in ALL.items() if p.of(records)]


def write(folder: Path, records: Sequence[Record]) -> None:
    """Draw the pictures whose records are there; remove the others."""
    for name, picture in ALL.items():
        path = folder / f"{name}.svg"
        if found := picture.of(records):
            with chart(path, picture.size) as axes:
                picture.draw(axes, found)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def chart(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Axes of an SVG with its text as text; equal figures give equal bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": path.name}
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
