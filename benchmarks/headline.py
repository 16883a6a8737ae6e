"""What holds for every row of the last run: the ranges of all its ratios; and the full size."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch

from benchmarks.report import AS_RELEASED, FULL, MAPPED, Record, text

# What is said of the rows of records, and the column that has its ratio.
SPEEDS = {"decode steps": "*decode, batch *", "prompts": "*prompt of *"}
FASTER, LESS = "upstream / plugin", "plugin / upstream"


def of(records: Sequence[Record], picture: str = "") -> str:
    """The sentences; below a picture with fewer details. Empty without a whole run's records."""
    speeds = [f"{what} {times(records, rows)}" for what, rows in SPEEDS.items()]
    memory = span(list(ratios(records, "resident memory*", LESS)))
    if not memory or not all(times(records, rows) for rows in SPEEDS.values()):
        return ""
    where = records[0].place if picture else records[0].source
    return (
        f"{picture}{full_size({record.name: record for record in records})}"
        f"Against vLLM's own models, in all tables: {' and '.join(speeds)}, with {memory} of the "
        f"peak memory. *{where}*\n"
    )


def full_size(records: Mapping[str, Record]) -> str:
    """What a released size takes as released, and how it compares with other engines."""
    start, steps = (records.get(f"{FULL}/{name}") for name in ("start", "steps"))
    if start is None or steps is None:
        return ""
    one = text(steps.rows["decode, batch 1"]["tokens a second"])
    ready = {row: f"ready in {text(cells['until ready'])} s" for row, cells in start.rows.items()}
    has_amx = "amx" in steps.origin["flags"]
    amx = "with AMX, llama.cpp without it" if has_amx else "without AMX"
    found = [f"{ready[AS_RELEASED]} (eager)", f"{one} tokens a second for one request (compiled)"]
    if peers := records.get(f"{FULL}/peers"):
        names = [name for name in peers.units if f"{name} / plugin" in peers.units]
        factors = (span([float(r[f"{n} / plugin"]) for r in peers.rows.values()]) for n in names)
        found += [f"{f} times as fast as {n}" for f, n in zip(factors, names, strict=True)]
    size = start.case.rpartition(", ")[0]
    packed = f"Packed and mapped: {ready[MAPPED]}. " if MAPPED in ready else ""
    return f"{size}, {amx}: {', '.join(found)}. {packed}*{steps.place}*\n\n"


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
