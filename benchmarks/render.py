"""Write the figures of README.md and docs/ from the records of the last whole run.

    python -m benchmarks.render            rewrite pages and pictures; measures nothing
    python -m benchmarks.render --check    exit with 1 if a page differs from the records

A page says which records it shows, and the lines between the two marks are generated:

    <!-- figures: engines/steps engines/memory -->
    <!-- end of figures -->

So are those of tables that are computed, not measured (TABLES), and the ranges of `headline`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Annotated

import typer

from benchmarks import headline, pictures, sizes
from benchmarks.origin import CHANGED
from benchmarks.report import MEASURED, OWN_RUNS, ROUNDS, Cell, Record, load_all, text

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
FIGURES = re.compile(
    r"(?P<begin><!-- figures: (?P<names>[^>]+) -->\n).*?(?P<end><!-- end of figures -->)", re.DOTALL
)
TABLES: dict[str, Callable[[], tuple[list[str], list[list[str]]]]] = {"sizes": sizes.table}
TABLE = re.compile(
    rf"(?P<begin><!-- (?P<name>{'|'.join(TABLES)}) -->\n).*?(?P<end><!-- end of (?P=name) -->)",
    re.DOTALL,
)
HEADLINE = re.compile(r"(?<=<!-- headline -->\n).*?(?=<!-- end of headline -->)", re.DOTALL)
NOT_MEASURED = "*No figures yet: `make bench` measures them.*\n"


class MixedRunsError(ValueError):
    """Records of more than one run, commit or machine."""


def check(records: Sequence[Record]) -> None:
    """Raise MixedRunsError unless all records are of one run of one tree on one machine.

    Those of OWN_RUNS are of runs of their own.
    """
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(record.part if record.part in OWN_RUNS else "", record)
        different = [k for k, value in record.origin.items() if value != other.origin.get(k)]
        if different or record.origin.keys() != other.origin.keys():
            both = f"{other.name} and {record.name}"
            raise MixedRunsError(f"{both} differ in {', '.join(different) or 'fields'}")
        if record.origin["commit"].endswith(CHANGED):
            raise MixedRunsError(f"{record.name} is of a commit and changes")


def pages(records: Sequence[Record]) -> dict[Path, str]:
    """Every page that shows records, as it must be."""
    check(records)
    found = {path: path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}
    marked = (FIGURES, TABLE, HEADLINE)
    return {
        path: rendered(page, path, records)
        for path, page in found.items()
        if any(mark.search(page) for mark in marked)
    }


def rendered(page: str, path: Path, records: Sequence[Record]) -> str:
    """A page with its records, computed tables and headline."""

    def figures(match: re.Match) -> str:
        names = match["names"].split()
        found = [r for name in names for r in records if PurePath(r.name).match(name)]
        return "".join([match["begin"], block(found) or NOT_MEASURED, match["end"]])

    def computed(match: re.Match) -> str:
        return "".join([match["begin"], table(*TABLES[match["name"]]()), match["end"]])

    page = TABLE.sub(computed, FIGURES.sub(figures, page))
    picture = "" if path.parent == DOCS else "![upstream and plugin](docs/performance.svg)\n\n"
    return HEADLINE.sub(lambda _: headline.of(records, picture) or NOT_MEASURED, page)


def block(records: Sequence[Record]) -> str:
    """Pictures and tables, and a line that says what, where and when."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(record.question, []).append(record)
    parts = [*pictures.links(records), *map(markdown, tables.values())]
    for place in dict.fromkeys(record.place for record in records):
        cases = dict.fromkeys(record.case for record in records)
        longest = [a for a in cases if not any(b.startswith(a) for b in cases if b != a)]
        commands = dict.fromkeys(f"`{command(record.part)}`" for record in records)
        parts.append(f"*{'; '.join(longest)}. {place}; {', '.join(commands)}*\n")
    return "\n".join(parts)


def command(part: str) -> str:
    return f"python -m benchmarks.{part}" if part in OWN_RUNS else f"--part {part}"


def markdown(same: Sequence[Record]) -> str:
    """Records of one question as a table, the question above the names of the rows."""
    whole = joined(same)
    return table([whole.question, *whole.columns], whole.cells())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    first, *rest = [f"| {' | '.join(line)} |\n" for line in (head, *rows)]
    return "".join([first, "|---" * len(head) + "|\n", *rest])


def joined(same: Sequence[Record]) -> Record:
    """All rows and columns of records of one question, ranges behind their medians."""
    units: dict[str, str] = {}
    rows: dict[str, dict[str, Cell]] = {}
    for record in same:
        units |= {name: u for name, u in record.units.items() if not name.endswith(ROUNDS)}
        for name, row in record.rows.items():
            ranges = {column: row.get(column + ROUNDS) for column in row}
            rows.setdefault(name, {}).update(
                {column: f"{text(cell)} ({ranges[column]})" if ranges[column] else cell
                 for column, cell in row.items()}
            )  # fmt: skip
    return replace(same[0], units=units, rows=rows)


def write() -> None:
    """Rewrite pages and pictures."""
    records = load_all(MEASURED)
    for path, page in pages(records).items():
        path.write_text(page)
    pictures.write(DOCS, records)


def main(
    only_check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a page is out of date.")
    ] = False,
) -> None:
    """Write the figures of README.md and docs/ from the records in benchmarks/measured/.

    Records come from one whole run, `make bench`, and one of each of OWN_RUNS; others are refused.
    """
    if not only_check:
        write()
        return
    found = pages(load_all(MEASURED)).items()
    if old := [path.name for path, page in found if path.read_text() != page]:
        raise SystemExit(f"out of date, run python -m benchmarks.render: {', '.join(old)}")


if __name__ == "__main__":
    typer.run(main)
