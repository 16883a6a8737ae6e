"""A host's sources, read and not imported: what a contract test asks of them."""

import ast
import importlib.util
import json
import os
import re
import zipfile
from functools import cache
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

import qwen3next_plugin
from qwen3next_plugin import versions
from qwen3next_plugin.engines.extras import FOLDER, modules_with_patches
from qwen3next_plugin.engines.patching import FUNCTIONS, Attribute, Entry, Item, Override, Patch

PLUGIN = Path(qwen3next_plugin.__file__).parent
ENGINES = PLUGIN / "engines"
OWN = "qwen3next_plugin.engines"
VARIABLE = "CONTRACT_WHEELS"  # not QWEN3NEXT_…: the plugin refuses such names that it lacks


def other_hosts(package: str) -> list[str]:
    """The wheels of a host that CONTRACT_WHEELS names, separated by colons."""
    wheels = filter(None, os.environ.get(VARIABLE, "").split(":"))
    return [wheel for wheel in wheels if Path(wheel).name.startswith(package)]


class Sources:
    """The Python files of one host: in a wheel, or in a folder that holds packages."""

    def __init__(self, package: str, path: Path) -> None:
        self.package = package
        self.archive = zipfile.ZipFile(path) if path.suffix == ".whl" else None
        self.files = frozenset(self.archive.namelist()) if self.archive else None
        self.path = path
        self.trees: dict[str, ast.Module] = {}

    @property
    def version(self) -> Version:
        if self.archive:
            return Version(self.path.name.split("-")[1])
        names = versions.DISTRIBUTIONS.get(self.package, (self.package,))
        found = [d.version for name in names for d in distributions(name=name, path=[self.path])]
        return Version(found[0])

    def has(self, name: str) -> bool:
        name = f"{self.package}/{name}"
        return name in self.files if self.files else (self.path / name).is_file()

    def tree(self, name: str) -> ast.Module:
        if name not in self.trees:
            assert self.has(name), f"{self.package}/{name} is gone"
            path = f"{self.package}/{name}"
            data = self.archive.read(path) if self.archive else (self.path / path).read_bytes()
            self.trees[name] = ast.parse(data)
        return self.trees[name]

    def file(self, module: str) -> str:
        """The file of a dotted module of the host's."""
        base = "/".join(module.split(".")[1:])
        candidates = [f"{base}.py", f"{base}/__init__.py"] if base else ["__init__.py"]
        present = [name for name in candidates if self.has(name)]
        assert present, f"{module} is gone"
        return present[0]

    def names(self, name: str) -> set[str]:
        """Everything that a module binds, at any depth of its top-level branches."""
        bound: set[str] = set()
        for node in ast.walk(self.tree(name)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name for alias in node.names}
                if node.names[0].name == "*":
                    bound |= self.names(name.replace("__init__", node.module.rpartition(".")[2]))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                bound.add(node.value)  # lazily exported: "ModelRegistry": ".model_executor…"
        return bound

    def check_import(self, module: str, symbol: str) -> None:
        """`from module import symbol` finds it: a submodule, or a name that the module binds."""
        inside = "/".join([*module.split(".")[1:], symbol])
        if self.has(f"{inside}.py") or self.has(f"{inside}/__init__.py"):
            return
        assert symbol in self.names(self.file(module)), f"{module}.{symbol} is gone"


@cache
def host(package: str, name: str) -> Sources:
    """The installed host, or the one of a wheel or folder."""
    if name == "installed":
        spec = importlib.util.find_spec(package)
        return Sources(package, Path(spec.submodule_search_locations[0]).parent)
    return Sources(package, Path(name))


def definition(tree: ast.AST, name: str) -> ast.AST:
    """The class, function or annotated name that a tree defines."""
    found = [node for node in ast.walk(tree) if getattr(node, "name", None) == name]
    found += [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", None) == name
    ]
    assert found, f"{name} is gone"
    return found[0]


def defining(sources: Sources, file: str, name: str) -> ast.Module:
    """The tree of the module that defines a name, which `file` may only import."""
    tree = sources.tree(file)
    if name in {getattr(node, "name", None) for node in tree.body}:
        return tree
    for node in tree.body:
        names = {alias.asname or alias.name for alias in getattr(node, "names", ())}
        if isinstance(node, ast.ImportFrom) and names & {name, "*"}:
            package = [sources.package, *file.split("/")[: -node.level]] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            if module.split(".")[0] == sources.package:
                return defining(sources, sources.file(module), name)
    return tree


def arguments(function: ast.AST) -> list[str]:
    """The names of a function's parameters."""
    args = function.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def signature(function: ast.AST) -> list[str]:
    """The names of all its parameters, in the order in which `inspect` gives them."""
    args = function.args
    stars = [[a.arg] if a else [] for a in (args.vararg, args.kwarg)]
    positional = [a.arg for a in (*args.posonlyargs, *args.args)]
    return [*positional, *stars[0], *(a.arg for a in args.kwonlyargs), *stars[1]]


def in_order(wanted: list[str], found: list[str]) -> bool:
    """Whether all that are wanted are found, in that order."""
    remaining = iter(found)
    return all(name in remaining for name in wanted)


def ours(package: str) -> list[Path]:
    """All files of ours that may import a host: the engine's, and its folders of extras."""
    folders = [ENGINES / package, *sorted(FOLDER.glob(f"*/{package}"))]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def dotted(path: Path) -> str:
    """The module of a file of ours."""
    return ".".join([PLUGIN.name, *path.relative_to(PLUGIN).with_suffix("").parts])


def imported(package: str) -> list[tuple[str, str]]:
    """(module, symbol) of every import that our engine code makes from the host."""
    found = set()
    for path in ours(package):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.split(".")[0] == package:
                found |= {(module, alias.name) for alias in node.names}
    return sorted(found)


def kept(owner: ast.AST) -> set[str]:
    """What a class keeps on itself: every `self.x` that it assigns to."""
    return {
        node.attr
        for node in ast.walk(owner)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", None) == "self"
    }


def keywords(tree: ast.AST, name: str) -> list[set[str]]:
    """Of each call of a function or method of that name, what it is given by name."""
    return [
        {keyword.arg for keyword in node.keywords}
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and name in (getattr(node.func, "attr", None), getattr(node.func, "id", None))
    ]


def changes(package: str) -> list[Entry]:
    """All changes to a host: patches, and what our code says that it overrides."""
    if package == "sglang":  # what it imports depends on its device, as at registration
        import_module(f"{OWN}.sglang.cpu.environment").use_cpu()
    patches = import_module(f"{OWN}.{package}.patches")
    for module in modules(package):
        import_module(module)
    table = getattr(patches, "TABLE", None)
    entries = [*(table.entries if table else ()), *overrides(package)]
    return sorted(entries, key=lambda entry: (entry.target, str(entry.group)))


def modules(package: str) -> list[str]:
    """The modules with patches, the core's and those of extras."""
    patches = import_module(f"{OWN}.{package}.patches")
    core = [f"{OWN}.{package}.{module}" for module in getattr(patches, "MODULES", ())]
    return [*core, *modules_with_patches(package)]


def overrides(package: str) -> list[Override]:
    """What decorators named `override` say; their modules are not imported."""
    patches = import_module(f"{OWN}.{package}.patches")
    return [
        Override(
            target=target.value,
            parameters=signatures(package).get(target.value),
            versions=patches.VERSIONS,
            module=dotted(path),
            **{keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords},
        )
        for path in ours(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "override"
        for target in node.args
    ]


def signatures(package: str) -> dict[str, list[str]]:
    """The generated file of an engine."""
    return json.loads((ENGINES / package / "signatures.json").read_text("utf-8"))


def found(sources: Sources, entry: Entry) -> tuple[Sources, str, ast.AST]:
    """The host, the file in it, and the class or module there that an entry changes."""
    *path, name = entry.target.split(".")
    if path[0] != sources.package:  # torch, which the host calls
        assert isinstance(entry, Patch)
        sources = host(path[0], "installed")
    inside, file = [
        (n, file)
        for n in range(1, len(path) + 1)
        for ending in (".py", "/__init__.py")
        if sources.has(file := "/".join(path[1:n]) + ending)
    ][-1]
    owner: ast.AST = sources.tree(file)
    for part in path[inside:]:
        owner = definition(owner, part)
    if isinstance(entry, Patch) and isinstance(owner, ast.Module):
        owner = defining(sources, file, name)
    return sources, file, owner


def signature_of(sources: Sources, entry: Entry) -> list[str] | None:
    """The parameters of the host's function that an entry changes; None if it is no function."""
    _, _, owner = found(sources, entry)
    name = entry.target.rpartition(".")[2]
    functions = [
        node
        for node in ast.walk(owner)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    by_name = isinstance(entry, Attribute) and isinstance(entry.value, property)
    return signature(functions[0]) if functions and not by_name else None


def check_entry(sources: Sources, entry: Entry) -> None:
    """A change fits the host's source."""
    assert SpecifierSet(entry.versions).contains(sources.version, prereleases=True)
    name = entry.target.rpartition(".")[2]
    sources, file, owner = found(sources, entry)
    forwards = False
    if isinstance(entry, Override):
        file_of_ours = PLUGIN.parent.joinpath(*entry.module.split(".")).with_suffix(".py")
        text = file_of_ours.read_text(encoding="utf-8")
        assert text.count(name) > 1
        forwards = forwards_more(ast.parse(text), name)
    if isinstance(entry, FUNCTIONS) or getattr(entry, "parameters", None) is not None:
        known = list(entry.parameters)
        assert signature(definition(owner, name))[: len(known) if forwards else None] == known
    elif isinstance(entry, Override) and isinstance(owner, ast.Module):
        assert name in sources.names(file)
    elif isinstance(entry, Override):
        annotated = [node for node in owner.body if isinstance(node, ast.AnnAssign)]
        assigned = [node for node in owner.body if isinstance(node, ast.Assign)]
        targets = [*(node.target for node in annotated), *(node.targets[0] for node in assigned)]
        assert name in {target.id for target in targets} | kept(owner)
    elif isinstance(entry, Item):
        value = definition(owner, name).value
        assert isinstance(value, ast.List if entry.key is None else ast.Dict)
    elif isinstance(entry.value, property):
        decorators = definition(owner, name).decorator_list
        assert "property" in {ast.unparse(decorator) for decorator in decorators}
    else:
        assert isinstance(entry, Attribute)
        assert name in sources.names(file)


def forwards_more(tree: ast.AST, name: str) -> bool:
    """Whether our method of that name passes on what a later host adds to its parameters."""
    methods = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return bool(methods) and all(node.args.vararg and node.args.kwarg for node in methods)


def check_modules(package: str) -> None:
    """The lists have all modules with patches, and no others."""
    decorated = {
        dotted(path)
        for path in ours(package)
        if re.search(r"^ *@patch\(|\bTABLE\.add\(", path.read_text(encoding="utf-8"), re.M)
    }
    assert decorated == set(modules(package))


def pairs(table: dict) -> list[tuple[str, str]]:
    """(path, name) of every entry of a table path → names, in the same order in every process."""
    return [(path, name) for path, names in table.items() for name in sorted(names)]
