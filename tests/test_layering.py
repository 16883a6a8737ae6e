"""Imports point one way, engines → model, mtp → kernels; the engines' parts are alike."""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = {"vllm", "sglang", "transformers"}
OWN = "qwen3next_plugin"
PLACES = {"kernels": "kernels", "mtp": "mtp", OWN: ""}  # folder → its package below OWN
ENGINES = ("vllm", "sglang")
ENGINE_FOLDERS = {"model", "state", "speculation", "cpu"}
OF_BOTH = (
    "patching",
    "patch_table",
    "extras",
    "hub",
    "memory",
    "plan",
    "pacing",
    "shared_prefixes",
)
LIBRARY = "transformers"  # a host without a server: it has the parts that it needs
OF_LIBRARY = {"speculation/answers.py"}  # an engine samples a batch, a library calls processors
ENGINE_FILES = {  # of every engine
    *("__init__.py", "names.py", "plugin.py", "flags.py", "patches.py"),
    *("model/trunk.py", "model/mtp.py", "model/linear_attention.py", "model/attention.py"),
    *("model/moe.py", "state/steps.py", "state/pages.py", "cpu/experts.py"),
    *("speculation/worker.py", "speculation/drafter.py"),
}
ABOVE = {  # folder → what it must not import, of ours
    "kernels": {"engines", "machine", "model", "mtp", "versions", "cli", "commands", "config"},
    "mtp": {"engines", "machine", "cli", "commands"},
    "qwen3next_plugin/model": {"engines", "machine", "mtp", "cli", "commands"},
    "qwen3next_plugin/config": {"engines", "machine", "model", "mtp", "kernels", "cli", "commands"},
    "qwen3next_plugin/machine": {
        *("engines", "extras", "model", "mtp", "kernels", "config", "cli", "commands", "versions"),
        *("env", "kept"),
    },
}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files, folder
    return files


def crossing(path: Path, forbidden: set[str]) -> list[str]:
    """Imports that go against the arrows: `vllm…`, or `qwen3next_plugin.engines…`."""
    return [
        name
        for name in imports(path)
        if name.split(".")[0] in forbidden
        or (name.startswith(f"{OWN}.") and name.split(".")[1] in forbidden)
    ]


def folders_of(engine: str) -> set[Path]:
    """What imports an engine: its own folder, and one of each extra that adds to it."""
    return {ROOT / OWN / "engines" / engine, *(ROOT / OWN / "extras").glob(f"*/{engine}")}


@pytest.mark.parametrize("folder", ABOVE)
def test_nothing_below_knows_an_engine_or_what_is_above(folder):
    forbidden = HOSTS | ABOVE[folder]
    found = {str(p.relative_to(ROOT)): crossing(p, forbidden) for p in sources(folder)}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("host", [*ENGINES, LIBRARY])
def test_only_the_engine_imports_its_host(host):
    inside = folders_of(host)
    others = [p for p in sources(OWN) if not inside & set(p.parents)]
    found = {str(p.relative_to(ROOT)): crossing(p, {host}) for p in others}
    assert not {path: names for path, names in found.items() if names}


def test_the_stand_in_for_sgl_kernel_imports_no_host():
    """SGLang imports it, and imports it before its own modules are there."""
    stand_in = sources(f"{OWN}/engines/sglang/cpu/stand_in")
    found = {str(p.relative_to(ROOT)): crossing(p, HOSTS) for p in stand_in}
    assert not {path: names for path, names in found.items() if names}


def test_the_engine_imports_no_other_engine():
    engines = {p.name for p in (ROOT / OWN / "engines").iterdir() if p.is_dir()}
    for engine in engines - {"__pycache__"}:
        for path in [path for each in folders_of(engine) for path in each.rglob("*.py")]:
            others = [n for n in imports(path) if n.startswith(f"{OWN}.engines.")]
            assert all(n.split(".")[2] in (engine, *OF_BOTH) for n in others), path


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_have_the_same_folders_and_files(engine):
    folder = ROOT / OWN / "engines" / engine
    folders = {p.name for p in folder.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == ENGINE_FOLDERS
    assert not {name for name in ENGINE_FILES if not (folder / name).is_file()}


def definitions(path: Path) -> list[str]:
    """The classes and functions at the top of a file, in order."""
    kinds = ast.ClassDef | ast.FunctionDef
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return [node.name for node in body if isinstance(node, kinds)]


def names(path: Path) -> Iterator[str]:
    """What a file defines: classes at any depth, and functions and variables at the top."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)


def in_both_engines() -> list[str]:
    first, second = (ROOT / OWN / "engines" / engine for engine in ENGINES)
    paths = (path.relative_to(first) for path in sorted(first.rglob("*.py")))
    return [str(p) for p in paths if (second / p).is_file() and p.name != "__init__.py"]


def test_there_are_pairs():
    assert len(in_both_engines()) > 16


@pytest.mark.parametrize("path", in_both_engines())
def test_a_pair_of_files_defines_the_same_in_the_same_order(path):
    """Files of one path in both engines share something public; another thing has another path."""
    first, second = (definitions(ROOT / OWN / "engines" / e / path) for e in ENGINES)
    shared = [name for name in first if name in second]
    assert [name for name in shared if not name.startswith("_")]
    assert shared == [name for name in second if name in first]


def test_the_core_names_no_extra():
    """It finds them by their folder, which may be deleted."""
    extras = ROOT / OWN / "extras"
    core = [path for folder in PLACES for path in sources(folder) if extras not in path.parents]
    for extra in extras.glob("*/__init__.py"):
        named = re.compile(rf"\bextras\.{extra.parent.name}\b")
        assert not [path for path in core if named.search(path.read_text(encoding="utf-8"))]


def test_an_extra_needs_no_other_one():
    """Files that another one loads may: what doctor says of it, cases of the self-check."""
    loaded_by = {"findings.py": "command_line", "cases.py": "self_check"}
    folder = ROOT / OWN / "extras"
    for path in folder.rglob("*.py"):
        extra = path.relative_to(folder).parts[0]
        others = {name.split(".")[2] for name in imports(path) if name.startswith(f"{OWN}.extras.")}
        assert others <= {extra, loaded_by.get(path.name)}, path


def test_a_library_has_parts_of_the_same_names():
    """Its folders are an engine's; a file of a path that an engine has is about the same thing."""
    folder, engine = (ROOT / OWN / "engines" / host for host in (LIBRARY, ENGINES[0]))
    for path in folder.rglob("*.py"):
        place = path.relative_to(folder)
        assert len(place.parts) == 1 or place.parts[0] in ENGINE_FOLDERS
        if path.name != "__init__.py" and (engine / place).is_file():
            assert set(names(path)) & set(names(engine / place)), place


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; the stand-in is another package."""
    found = {}
    for folder, place in PLACES.items():
        for path in sources(folder):
            if "stand_in" not in path.parts:
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                dotted = ".".join(filter(None, (OWN, place, *parts)))
                found[dotted.removesuffix(".__init__")] = path
    return found


def needed(name: str, imported: str, files: Mapping[str, Path]) -> Iterator[str]:
    """The modules that an import in `name` runs: the packages around it, too, but for its own."""
    while imported:
        if imported in files and not f"{name}.".startswith(f"{imported}."):
            yield imported
        imported = imported.rpartition(".")[0]


def test_no_modules_import_each_other_in_a_circle():
    """Nor within functions."""
    files = modules()
    graph = {
        name: {module for imported in imports(path) for module in needed(name, imported, files)}
        for name, path in files.items()
    }
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_tests_are_skipped_in_one_place_only():
    """By the table of needs.py; what does not import is an error, no skip."""
    skips = re.compile(r"\b(pytest|mark|unittest|hypothesis)\.(skip|xfail|importorskip|SkipTest)")
    found = {path.name for path in sources("tests") if skips.search(path.read_text("utf-8"))}
    assert found == {"needs.py", "test_needs.py"}


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_nothing_imports_a_folder_that_an_installed_package_would_replace(folder):
    """`kernels` is a package of Hugging Face's, which wins over a folder of that name."""
    for path in sources(folder):
        assert not {name.split(".")[0] for name in imports(path)} & {"kernels", "mtp"}, path


def lines(paths: Iterable[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_parts_keep_their_budgets_of_lines():
    """By the table of CONTRIBUTING.md, which has every extra."""
    extras = ROOT / OWN / "extras"
    found = {
        f"`extras/{path.parent.name}`": lines(path.parent.rglob("*.py"))
        for path in extras.glob("*/__init__.py")
    }
    core = [path for path in [*sources(OWN), *sources("mtp")] if extras not in path.parents]
    found["`qwen3next_plugin` without extras, `mtp`"] = lines(core)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+`) \| ([\d,]+) \|$", page, re.MULTILINE)
    budgets = {part: int(most.replace(",", "")) for part, most in rows}
    assert found.keys() <= budgets.keys()
    assert not {part: count for part, count in found.items() if count > budgets[part]}
