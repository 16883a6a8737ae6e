"""Links, anchors, files and methods that the pages name exist; the pages keep word budgets."""

import json
import re
from functools import cache
from pathlib import Path

import pytest

import durations

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *DOCS]
ENGINES = "qwen3next_plugin/engines"
ROOTS = [ROOT / root for root in ("", "qwen3next_plugin", f"{ENGINES}/vllm", f"{ENGINES}/sglang")]
BUDGET = 11_000  # words of docs/, besides what is generated
BUDGET_OF_ONE = 1_000  # words of README, and of CONTRIBUTING
WORDS_OF_A_FACT = 20  # in CHANGELOG

GENERATED = re.compile(
    r"<!-- (figures: |patches|durations).*?<!-- end of (figures|patches|durations) -->", re.DOTALL
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
OURS = re.compile(r"(?<!\*)`([^`\n]+)`")  # *`…`* is an engine's own
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)+/?")
METHOD = re.compile(r"([A-Z]\w+)\.(\w+)")
TEST = re.compile(r"`([\w/]+\.py)(?:::(\w+))?`")


@cache
def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files(page: Path) -> list[str]:
    """What looks like a file or folder of the project, in backticks."""
    tops = {path.name for root in ROOTS for path in root.iterdir()}
    words = filter(FILE.fullmatch, OURS.findall(prose(page)))
    return [word for word in words if word.split("/")[0] in tops]


@cache
def sources() -> list[str]:
    folders = (ROOT / folder for folder in ("qwen3next_plugin", "kernels", "mtp"))
    return [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    for path, anchor in LINK.findall(prose(page)):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    assert not [word for word in files(page) if not any((root / word).exists() for root in ROOTS)]


def test_methods_of_the_architecture_exist():
    words = OURS.findall(prose(ROOT / "docs" / "architecture.md"))
    methods = [match.groups() for word in words if (match := METHOD.fullmatch(word))]
    assert len(methods) > 10

    def exists(owner: str, name: str) -> bool:
        owners = [text for text in sources() if re.search(rf"^class {owner}\b", text, re.MULTILINE)]
        return any(re.search(rf"\bdef {name}\(", text) for text in owners)

    assert not [f"{owner}.{name}" for owner, name in methods if not exists(owner, name)]


def test_tests_of_the_security_page_exist():
    page = ROOT / "docs" / "security.md"
    rows = re.findall(r"^\| (?!a |an |-)[^|]*\|[^|]*\|([^|]*)\|$", prose(page), re.MULTILINE)
    assert len(rows) > 20
    for shown in rows:
        named = TEST.findall(shown)
        assert named or shown.strip() == "–"
        for file, name in named:
            source = (ROOT / file).read_text(encoding="utf-8")
            assert re.search(rf"def {name or 'test_'}", source), f"{file}::{name}"


def test_the_reading_path_stays_short():
    page = ROOT / "docs" / "architecture.md"
    lines = re.findall(r"^\d+\. .*", prose(page), re.MULTILINE)
    path = [name for line in lines for name in re.findall(r"\]\(([^)]+)\)", line)]
    assert 9 <= len(lines) <= 12
    lengths = {name: len((page.parent / name).read_text("utf-8").splitlines()) for name in path}
    assert sum(lengths.values()) <= 2_100, lengths


def test_parts_and_switches_of_the_training_page_exist():
    page, folder = ROOT / "docs" / "training.md", ROOT / "examples" / "train_tiny"
    recipe, train = (
        (folder / f"{name}.py").read_text(encoding="utf-8") for name in ("recipe", "train")
    )
    words = OURS.findall(prose(page))
    parts = {word for word in words if word.isidentifier()}
    defined = re.findall(r"^(?:class|def) (\w+)", recipe, re.MULTILINE)
    assert len(parts) > 5
    assert parts <= set(defined)
    switches = [word.split()[0] for word in words if word.startswith("--")]
    assert len(switches) == 3
    for switch in switches:
        option = switch.removeprefix("--").removeprefix("no-").replace("-", "_")
        assert f"    {option}: Annotated[" in train


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_starts_with_a_command(page):
    assert page.read_text(encoding="utf-8").split("\n\n")[1].startswith("```")


def count(text: str) -> int:
    """What has a letter or a digit: the bars of tables are no words."""
    return sum(bool(re.search(r"\w", word)) for word in text.split())


def words(page: Path) -> int:
    """Those of a page that no program wrote."""
    return count(GENERATED.sub("", page.read_text(encoding="utf-8")))


def test_budgets_of_words():
    assert sum(map(words, DOCS)) <= BUDGET
    assert words(ROOT / "README.md") <= BUDGET_OF_ONE
    assert words(ROOT / "CONTRIBUTING.md") <= BUDGET_OF_ONE


def test_each_fact_of_the_changelog_is_a_short_bullet():
    _, *sections = re.split(r"^#{2,3} .+$", prose(ROOT / "CHANGELOG.md"), flags=re.MULTILINE)
    lines = [line for section in sections for line in section.splitlines() if line]
    assert len(lines) > 100
    assert not [line for line in lines if not line.startswith("- ")]
    assert not [line for line in lines if count(line) > WORDS_OF_A_FACT]
    assert not [line for line in lines if re.search(r"\. [A-Z]", line)]  # a second sentence


def test_times_of_tests_are_rendered():
    """By `python tests/durations.py`."""
    times = json.loads(durations.TIMES.read_text("utf-8"))
    (table,) = durations.TABLES.findall(durations.PAGE.read_text("utf-8"))
    assert table == durations.tables(times)
