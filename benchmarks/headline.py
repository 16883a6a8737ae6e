"""What holds for every row of the last run: the ranges of all its ratios."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

from benchmarks.report import Record, text

# What is said of the rows of records, and the column that has its ratio.
SPEEDS = {"decode steps": "*decode, batch *", "prompts": "*prompt of *"}
FASTER, LESS = "upstream / plugin", "plugin / upstream"


def of(records: Sequence[Record], picture: str = "") -> str:
    """The sentence, below a picture; empty without the records."""
    speeds = [f"{what} {times(records, rows)}" for what, rows in SPEEDS.items()]
    memory = span(list(ratios(records, "resident memory*", LESS)))
    if not memory or not all(times(records, rows) for rows in SPEEDS.values()):
        return ""
    return (
        f"{picture}Against vLLM's own models, in all tables: "
        f"{' and '.join(speeds)}, with {memory} of the peak memory. *{records[0].source}*\n"
    )


def times(records: Sequence[Record], rows: str) -> str:
    found = span(list(ratios(records, rows, FASTER)))
    return f"{found} times as fast" if found else ""


def ratios(records: Sequence[Record], rows: str, column: str) -> Iterator[float]:
    """The values of a column in all rows of that name."""
    for record in records:
        if record.name.startswith(("engines/", "mtp/")) and column in record.units:
            yield from (float(row[column]) for n, row in record.rows.items() if fnmatch(n, rows))


def span(found: list[float]) -> str:
    """From the least to the greatest."""
    return " to ".join(dict.fromkeys(text(x) for x in (min(found), max(found)))) if found else ""
