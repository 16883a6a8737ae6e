"""Writes what is generated of an engine's patches: `python tests/engines/patch_lists.py vllm`."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from engines.contract import ENGINES, OWN, PLUGIN, changes, host, signature_of
from qwen3next_plugin.engines.patching import Entry

PAGE = ENGINES.parents[1] / "docs" / "patches.md"
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
HEAD = "| target | when | reason | remove when |\n|---|---|---|---|\n"
BEGIN, END = "<!-- patches of {} -->\n", "<!-- end of patches -->"


def signatures(package: str) -> str:
    """The text of an engine's signatures.json: a line for each function, by the installed host."""
    sources = host(package, "installed")
    found = {entry.target: signature_of(sources, entry) for entry in changes(package)}
    lines = [
        f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in found.items() if of is not None
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def section(package: str) -> str:
    """An engine's part of the page: a line for each change, by the file of ours that makes it."""
    files: dict[str, list[str]] = {}
    for entry in sorted(changes(package), key=lambda entry: (entry.module, entry.target)):
        lines = files.setdefault(_short(package, entry.module), [])
        if (line := _line(package, entry)) not in lines:
            lines.append(line)
    parts = [
        f"`{file.replace('.', '/')}.py`\n\n{HEAD}{''.join(lines)}" for file, lines in files.items()
    ]
    return BEGIN.format(NAMES[package]) + "\n".join(parts) + END


def _short(package: str, module: str) -> str:
    return module.removeprefix(f"{OWN}.{package}.").removeprefix(f"{PLUGIN.name}.")


def _line(package: str, entry: Entry) -> str:
    target = entry.target.removeprefix(f"{package}.")
    when = entry.group.value if entry.group else "by our code"
    upstream = f" ([upstream]({entry.upstream}))" if entry.upstream else ""
    return f"| *`{target}`* | {when} | {entry.reason}{upstream} | {entry.remove_when} |\n"


def page(package: str, text: str) -> str:
    """The page with this engine's part renewed."""
    begin = BEGIN.format(NAMES[package])
    part = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    return part.sub(lambda _: section(package), text)


def check_generated(package: str) -> None:
    """Both files are what this module writes."""
    assert (ENGINES / package / "signatures.json").read_text("utf-8") == signatures(package)
    assert PAGE.read_text("utf-8") == page(package, PAGE.read_text("utf-8"))


def main(package: Annotated[str, typer.Argument(help=", ".join(NAMES))]) -> None:
    """Write signatures.json, by the installed engine, and the engine's part of docs/patches.md."""
    (ENGINES / package / "signatures.json").write_text(signatures(package), "utf-8")
    PAGE.write_text(page(package, PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    typer.run(main)
