"""Links, anchors and paths in the pages resolve, and docs/ stays within its budget of words."""

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + DOCS
ROOTS = (
    "",
    "qwen3next_plugin",
    *(f"qwen3next_plugin/engines/{host}" for host in ("vllm", "sglang")),
)
BUDGET = 12_000
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?|[\w-]+\.(?:py|md|cpp|h)")


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def named(page: Path) -> list[str]:
    """What looks like a file or folder of the project, in backticks."""
    words = [word for word in CODE.findall(prose(page)) if FILE.fullmatch(word)]
    tops = {path.name for root in ROOTS for path in (ROOT / root).iterdir()}
    return [word for word in words if "/" in word and word.split("/")[0] in tops]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {path}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    missing = [
        word for word in named(page) if not any((ROOT / root / word).exists() for root in ROOTS)
    ]
    assert not missing


def test_a_page_starts_with_a_command():
    first = {page.name: page.read_text(encoding="utf-8").split("\n\n")[1] for page in DOCS}
    assert not {name for name, block in first.items() if not block.startswith("```")}


def test_budget_of_words():
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in DOCS) <= BUDGET
