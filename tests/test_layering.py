"""Arrows point one way: engines → model, mtp → kernels; one folder imports each host."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOSTS = {"vllm", "sglang", "transformers"}
OWN = "qwen3next_plugin"
ABOVE = {  # folder → what it must not import, of ours
    "kernels": {"engines", "model", "mtp", "config", "versions", "cli"},
    "mtp": {"engines", "cli"},
    "qwen3next_plugin/model": {"engines", "mtp", "cli"},
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


@pytest.mark.parametrize("folder", ABOVE)
def test_nothing_below_knows_an_engine_or_what_is_above(folder):
    forbidden = HOSTS | ABOVE[folder]
    found = {str(p.relative_to(ROOT)): crossing(p, forbidden) for p in sources(folder)}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("host", ["vllm", "sglang"])
def test_only_the_engine_imports_its_host(host):
    inside = ROOT / OWN / "engines" / host
    others = [p for p in sources(OWN) if inside not in p.parents]
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
        for path in (ROOT / OWN / "engines" / engine).rglob("*.py"):
            others = [n for n in imports(path) if n.startswith(f"{OWN}.engines.")]
            assert all(n.split(".")[2] in (engine, "patching") for n in others), path
