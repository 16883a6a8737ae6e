"""Triton kernels of the host on a CPU: their own source, run by Triton's interpreter."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def interpreted(source: Path, folder: Path) -> ModuleType:
    """A module with every `@triton.jit` function of a source file, and nothing else of it.

    Where vLLM finds no GPU it leaves its kernels undecorated, so they are compiled anew. Callers
    give Triton's own jitted helpers the same treatment, see `helpers`.
    """
    text = source.read_text(encoding="utf-8")
    kernels = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(decorator, node.decorator_list)
    ]
    parts = ["import triton", "import triton.language as tl"]
    for node in kernels:
        first = node.decorator_list[0].lineno - 1
        parts.append("\n".join(text.splitlines()[first : node.end_lineno]))
    copy = folder / f"{source.stem}_kernels.py"
    copy.write_text("\n\n\n".join(parts) + "\n", encoding="utf-8")  # the interpreter reads it again
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def decorator(node: ast.expr) -> str:
    """`triton.jit` of `@triton.jit` and of `@triton.jit(…)`."""
    return ast.unparse(node.func if isinstance(node, ast.Call) else node)


def helpers() -> dict[str, InterpretedFunction]:
    """What the kernels call of `triton.language` that is itself jitted, when Triton is imported."""
    return {name: InterpretedFunction(getattr(tl, name).fn) for name in ("cdiv",)}
