"""Write the figures of docs/ from the records in benchmarks/measured/; measures nothing.

    python -m benchmarks.render            rewrite pages and pictures
    python -m benchmarks.render --check    exit with 1 if a page differs from the records

A page says which records it shows, and the lines between the two marks are generated:

    <!-- figures: engines/steps engines/prefill -->
    <!-- end of figures -->

Between <!-- sizes --> and <!-- end of sizes --> is the table of benchmarks/sizes.py.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import sizes
from benchmarks.report import MEASURED, ROUNDS, Cell, Record, text

DOCS = Path(__file__).parent.parent / "docs"
FIGURES = re.compile(
    r"(?P<begin><!-- figures: (?P<names>[^>]+) -->\n).*?(?P<end><!-- end of figures -->)", re.DOTALL
)
SIZES = re.compile(r"(?<=<!-- sizes -->\n).*?(?=<!-- end of sizes -->)", re.DOTALL)
MARK = re.compile(r"<!-- (figures:|sizes)")
CLIENTS = re.compile(r"(.+), (\d+)")  # a row's case, and how many
CONTEXT = re.compile(r"(prefill|decode), ([\d,]+)")  # a row of claim/factors
PICTURES = {"claim/factors": "![by context](claim.svg)\n\n"}  # above the tables
OURS, THEIRS, LINE = "#4c72b0", "#bbbbbb", "#c44e52"


def load(name: str) -> Record:
    """A record that docs/ shows."""
    return Record.load(MEASURED / f"{name}.json")


def load_all(pattern: str) -> list[Record]:
    """A record, or all whose names match `mtp/over_off/*`, of which there may be none."""
    names = (path.relative_to(MEASURED).with_suffix("") for path in MEASURED.rglob("*.json"))
    matching = sorted(str(name) for name in names if name.match(pattern))
    return [load(name) for name in (matching if "*" in pattern else [pattern])]


def rendered(page: str) -> str:
    """A page with the figures of its records, and with the table of sizes if it shows that."""

    def figures(match: re.Match) -> str:
        records = [record for name in match["names"].split() for record in load_all(name)]
        shown = [PICTURES[record.name] for record in records if record.name in PICTURES]
        return "".join([match["begin"], *shown, block(records), match["end"]])

    page = FIGURES.sub(figures, page)
    return SIZES.sub(lambda _: table(*sizes.table()), page)


def block(records: list[Record]) -> str:
    """Tables, and after those with the same sources a line for each machine and date."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record.question, []).append(record)
    parts = []
    for _, same in groupby(tables.values(), key=lambda records: {r.source for r in records}):
        group = list(same)
        parts += [markdown(records) for records in group]
        together = [record for records in group for record in records]
        for origin in dict.fromkeys(record.origin for record in together):
            found = [record for record in together if record.origin == origin]
            cases = dict.fromkeys(record.case for record in found)
            longest = [a for a in cases if not any(b.startswith(a) for b in cases if b != a)]
            commands = dict.fromkeys(f"`{record.command}`" for record in found)
            parts.append(f"*{'; '.join(longest)}. {origin}; {', '.join(commands)}*\n")
    return "\n".join(parts)


def markdown(same: list[Record]) -> str:
    """Records of one question as a table, the question above the names of the rows."""
    if quick := [record.name for record in same if record.quick]:
        raise ValueError(f"{quick[0]} is from a quick run: it is not for docs/")
    whole = joined(same)
    return table([whole.question, *whole.columns], whole.cells())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *rest = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([first, "|---" * len(head) + "|\n", *rest])


def joined(table: list[Record]) -> Record:
    """All rows and columns of records of one question, ranges behind their medians."""
    units: dict[str, str] = {}
    rows: dict[str, dict[str, Cell]] = {}
    for record in table:
        units |= {name: u for name, u in record.units.items() if not name.endswith(ROUNDS)}
        for name, row in record.rows.items():
            ranges = {column: row.get(column + ROUNDS) for column in row}
            rows.setdefault(name, {}).update(
                {column: f"{text(cell)} ({ranges[column]})" if ranges[column] else cell
                 for column, cell in row.items()}
            )  # fmt: skip
    return replace(table[0], units=units, rows=rows)


def pages() -> dict[Path, str]:
    """Every page that has generated lines, as it should be."""
    found = {path: path.read_text() for path in sorted(DOCS.glob("*.md"))}
    return {path: rendered(page) for path, page in found.items() if MARK.search(page)}


def write() -> None:
    """Rewrite pages and pictures."""
    for path, page in pages().items():
        path.write_text(page)
    speeds_picture(load("engines/steps"), load("engines/prefill"))
    steps_picture(load("mtp/steps"))
    if (MEASURED / "claim" / "factors.json").exists():
        claim_picture(load("claim/factors"))
    if (MEASURED / "mtp" / "over_off").exists():
        clients_picture(load_all("mtp/over_off/*/*"))


def speeds_picture(*records: Record) -> None:
    """Bars: how many times as fast as upstream the plugin is."""
    rows = {}
    for record in records:
        (ratio,) = (column for column in record.units if " / " in column)
        what = record.name.split("/")[1].removesuffix("s")
        for name, row in record.rows.items():
            rows[name if what == "step" else f"{what}, {name}"] = row[ratio]
    with chart(DOCS / "performance.svg", (7, 0.45 * len(rows) + 0.8)) as axes:
        bars = axes.barh(list(rows), list(rows.values()), color=OURS)
        axes.bar_label(bars, fmt="%.2f×", padding=3)
        axes.axvline(1, color="#333333", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel("times upstream's speed")


def steps_picture(record: Record) -> None:
    """Verify steps in plain steps: both sides, and the floor counted in bytes."""
    rows = record.rows
    with chart(DOCS / "mtp-steps.svg", (7.5, 4)) as axes:
        for offset, side, colour in ((-0.2, "upstream", THEIRS), (0.2, "plugin", OURS)):
            places = [i + offset for i in range(len(rows))]
            bars = axes.bar(
                places, [row[side] for row in rows.values()], 0.38, color=colour, label=side
            )
            axes.bar_label(bars, fmt="%.2f", fontsize=8)
        for i, row in enumerate(rows.values()):
            label = "floor" if i == 0 else None
            axes.hlines(row["floor"], i - 0.42, i + 0.42, LINE, ":", label=label)
        axes.set_xticks(range(len(rows)), list(rows), fontsize=8)
        axes.set_ylabel("plain steps")
        axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.15))


def clients_picture(records: list[Record]) -> None:
    """Lines: answers with MTP over those without, by clients; bars are the rounds' range."""
    styles, colours = {"vLLM": "-", "SGLang": "--"}, dict[str, str]()
    with chart(DOCS / "mtp-clients.svg", (7.5, 4)) as axes:
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


def claim_picture(record: Record) -> None:
    """Lines: how many times as fast Qwen3-Next is, by context; crosses: what is published."""
    rows = {m.groups(): row for name, row in record.rows.items() if (m := CONTEXT.fullmatch(name))}
    with chart(DOCS / "claim.svg", (6.5, 3.6)) as axes:
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


def main(
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a page is out of date.")
    ] = False,
) -> None:
    """Write the figures of docs/ from the records in benchmarks/measured/; measures nothing.

    A page shows records between two marks: <!-- figures: engines/steps mtp/idle --> and
    <!-- end of figures -->. Records come from full runs: python -m benchmarks.engines --docs
    measures, replaces the records and renders.
    """
    if not check:
        write()
        return
    old = [path.name for path, page in pages().items() if path.read_text() != page]
    if old:
        raise SystemExit(f"out of date, run python -m benchmarks.render: {', '.join(old)}")


if __name__ == "__main__":
    typer.run(main)
