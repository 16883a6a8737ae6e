"""The commands that README and docs show, as a shell reads them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / "examples" / name / "README.md" for name in ("", "qwen3next-tiny", "train_tiny")),
)
BLOCK = re.compile(r"^```(bash|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
VARIABLE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    page: str
    variables: tuple[tuple[str, str], ...]  # set in front of it
    words: tuple[str, ...]

    @property
    def program(self) -> str:
        """What is run: a program, or the module or script that a Python runs."""
        name = Path(self.words[0]).name
        if name not in ("python", "python3"):
            return name
        return self.words[2] if self.words[1] == "-m" else self.words[1]

    @property
    def arguments(self) -> list[str]:
        """Those of the program."""
        skipped = 1 if Path(self.words[0]).name not in ("python", "python3") else 2
        return list(self.words[skipped + (self.words[1:2] == ("-m",)) :])

    def __str__(self) -> str:
        return f"{Path(self.page).name}: {' '.join(self.words)[:60]}"


def commands() -> list[Command]:
    """All of them, in the order of the pages."""
    return [
        command
        for page in PAGES
        for kind, text in BLOCK.findall(page.read_text(encoding="utf-8"))
        for command in _parsed(str(page.relative_to(ROOT)), kind, text)
    ]


def of(*programs: str) -> list[Command]:
    """Those of some programs; fails if a program has none."""
    found = [command for command in commands() if command.program in programs]
    assert {command.program for command in found} == set(programs)
    return found


def _parsed(page: str, kind: str, text: str) -> Iterator[Command]:
    lines = text.replace("\\\n", " ").splitlines()
    if kind == "console":
        lines = [line.removeprefix("$ ") for line in lines]
    joined = ""
    for line in lines:
        joined += line + "\n"
        try:
            words = shlex.split(joined, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        joined = ""
        for is_and, part in groupby(words, lambda word: word == "&&"):
            if not is_and:
                yield _command(page, list(part))
    assert not joined, f"{page}: {joined}"


def _command(page: str, words: list[str]) -> Command:
    variables = []
    while match := VARIABLE.fullmatch(words[0]):
        variables.append(match.groups())
        words = words[1:]
    return Command(page, tuple(variables), tuple(words))
