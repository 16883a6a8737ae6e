"""The one reader of the QWEN3NEXT_* environment variables; a bad value raises."""

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path

PREFIX = "QWEN3NEXT_"
# What Kubernetes sets in each pod for a service that is named qwen3next or qwen3next-….
OF_SERVICE = re.compile(
    r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_PROTO|_PORT|_ADDR)?)?)$"
)

SECONDS = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


class EnvError(ValueError):
    """A QWEN3NEXT_* variable is unknown, or its value is not allowed."""


@dataclass(frozen=True, slots=True)
class Variable:
    """One variable: its allowed values (none: seconds), its value when unset, what it does."""

    allowed: tuple[str, ...]
    default: str | None
    help: str


VARIABLES: Mapping[str, Variable] = {
    "QWEN3NEXT_KERNELS": Variable(
        ("auto", "cpu", "triton", "reference"),
        "auto",
        "kernel backend: by device; native CPU kernels; Triton kernels for GPUs;"
        " or the slow PyTorch reference",
    ),
    "QWEN3NEXT_ISA": Variable(
        ("baseline", "avx2", "avx512", "avx512bf16", "amx", "dotprod", "i8mm"),
        None,
        "highest instruction set that the CPU kernels use; unset: the processor's highest",
    ),
    "QWEN3NEXT_DRAFTS": Variable(
        ("adaptive", "fixed"),
        "adaptive",
        "draft lengths with MTP: whatever is fastest, up to num_speculative_tokens, or always that",
    ),
    "QWEN3NEXT_QUANTISE": Variable(
        ("int8", "int4"),
        None,
        "on a CPU, quantise a checkpoint in 16 or 32 bits as it loads; unset: serve it as it is",
    ),
    "QWEN3NEXT_HEAD": Variable(
        ("auto", "plain"),
        "auto",
        "on a CPU, a quantised model's output head and stream mixers: in int8 like the rest, or as"
        " stored",
    ),
    "QWEN3NEXT_MMAP": Variable(
        ("0", "1"),
        "0",
        "1: on a CPU, what `qwen3next pack` wrote stays in its files, which servers share and Linux"
        " pages",
    ),
    "QWEN3NEXT_NGRAM": Variable(
        ("mapped", "resident"),
        "mapped",
        "the table of n-gram embeddings: in the checkpoint's files, of which Linux keeps the pages"
        " that are read often; or in memory",
    ),
    "QWEN3NEXT_BATCH_INVARIANT": Variable(
        ("0", "1"),
        "0",
        "1: on a CPU, a token's bits do not depend on batch, chunks, drafts or engine (bfloat16)",
    ),
    "QWEN3NEXT_STEP_SECONDS": Variable(
        (),
        "1.0",
        "on a CPU, how long a step may take that reads prompts while others wait for tokens;"
        " 0: chunks of the engine's size",
    ),
    "QWEN3NEXT_DISABLE": Variable(("0", "1"), "0", "1 leaves the engine untouched"),
    "QWEN3NEXT_OPTIONAL": Variable(
        ("0", "1"),
        "0",
        "1 logs a failed registration and lets the engine serve its built-in model",
    ),
}


def kernels() -> str:
    """The kernel backend to use: `auto`, `cpu`, `triton` or `reference`."""
    return _read("QWEN3NEXT_KERNELS") or "auto"


def isa() -> str | None:
    """The highest instruction set that CPU kernels may use, or None for the processor's."""
    return _read("QWEN3NEXT_ISA")


def drafts() -> str:
    """How long drafts are: `adaptive` or `fixed`."""
    return _read("QWEN3NEXT_DRAFTS") or "adaptive"


def quantise() -> str | None:
    """The format that weights are quantised to as they load, or None."""
    return _read("QWEN3NEXT_QUANTISE")


def head() -> str:
    """How output head and stream mixers of a quantised model are served: `auto` (int8), `plain`."""
    return _read("QWEN3NEXT_HEAD") or "auto"


def mmap() -> bool:
    """Whether the weights of a packed checkpoint stay in its mapped files."""
    return _read("QWEN3NEXT_MMAP") == "1"


def ngram() -> str:
    """Where the table of n-gram embeddings is: `mapped` or `resident`."""
    return _read("QWEN3NEXT_NGRAM") or "mapped"


def batch_invariant() -> bool:
    """Whether a token's bits must not depend on its batch."""
    return _read("QWEN3NEXT_BATCH_INVARIANT") == "1"


def step_seconds() -> float:
    """Seconds of a step that reads prompts while others wait; 0: any."""
    return float(_read("QWEN3NEXT_STEP_SECONDS") or 0)


def disabled() -> bool:
    """Whether the plugin leaves the engine untouched."""
    return _read("QWEN3NEXT_DISABLE") == "1"


def optional() -> bool:
    """Whether a failing registration is only logged."""
    return _read("QWEN3NEXT_OPTIONAL") == "1"


def check() -> None:
    """Raise on the first unknown variable or bad value; called once at registration."""
    known = variables()
    for name in in_force():
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
            raise EnvError(f"{name} is not a variable of qwen3next_plugin; {hint}")
        read(name, known[name])


@cache
def variables() -> Mapping[str, Variable]:
    """The core's, and those that extras declare: `VARIABLES` in their folder's `variables.py`."""
    found = dict(VARIABLES)
    for path in sorted(Path(__file__).parent.glob("extras/*/variables.py")):
        found |= import_module(f"qwen3next_plugin.extras.{path.parent.name}.variables").VARIABLES
    return found


def in_force() -> dict[str, str]:
    """The QWEN3NEXT_* variables that are set, unchecked; not those of a Kubernetes service."""
    ours = (name for name in sorted(os.environ) if name.startswith(PREFIX))
    return {name: os.environ[name] for name in ours if not OF_SERVICE.search(name)}


def _read(name: str) -> str | None:
    return read(name, VARIABLES[name])


def read(name: str, variable: Variable) -> str | None:
    """The value in force of a variable that is declared so; None: unset, without a default.

    Raises: EnvError for a value that is not allowed.
    """
    value = os.environ.get(name, variable.default)
    if value is not None and not _allows(variable, value):
        allowed = ", ".join(variable.allowed)
        raise EnvError(
            f"{name}={value!r} is not allowed; use {f'one of {allowed}' if allowed else 'seconds'}"
            f" (unset: {variable.default or 'chosen by the machine'})"
        )
    return value


def _allows(variable: Variable, value: str) -> bool:
    if variable.allowed:
        return value in variable.allowed
    return SECONDS.fullmatch(value) is not None
