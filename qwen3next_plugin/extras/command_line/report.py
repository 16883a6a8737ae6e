"""The report of `qwen3next doctor`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. Only `broken` makes the command fail."""

    section: str
    subject: str
    found: str
    status: Literal["ok", "note", "broken"] = "ok"
    fix: str = ""


def print_report(findings: Sequence[Finding]) -> None:
    """A table, then how to mend what is broken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    colours = {"ok": "green", "note": "yellow", "broken": "bold red"}
    what, found = Column("what", no_wrap=True), Column("found", overflow="fold")  # never cut
    table = Table("", what, found, "", title="qwen3next doctor")
    previous = None
    for f in findings:
        if previous not in (None, f.section):
            table.add_section()
        status = f"[{colours[f.status]}]{f.status}[/]"
        table.add_row(
            "" if f.section == previous else f.section, f.subject, escape(f.found), status
        )
        previous = f.section
    console = Console()
    console.print(table)
    for f in findings:
        if f.fix:
            console.print(f"[bold]{f.subject}[/]: {escape(f.fix)}", highlight=False)
