"""Makes `import sgl_kernel` work: the genuine package if it imports, else our stand-in."""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module, invalidate_caches
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

NAME = "sgl_kernel"
# It contains only the stand-in, so that it can be added to sys.path. SGLang spawns its workers, and
# multiprocessing passes sys.path on to them; a meta-path finder would not reach them.
FOLDER = Path(__file__).parent / "stand_in"


@dataclass(frozen=True, slots=True)
class KernelPackage:
    """Which `sgl_kernel` is imported, and why it is that one."""

    genuine: bool
    version: str
    reason: str

    def __str__(self) -> str:
        kind = "genuine" if self.genuine else "stand-in"
        return f"{NAME}: {kind}, version {self.version} ({self.reason})"


@cache
def provide() -> KernelPackage:
    """Make `import sgl_kernel` work; the stand-in is used only if no genuine package imports.

    Raises: ImportError: the stand-in itself does not import.
    """
    if not _found():
        return _stand_in(len(sys.path), "no other is installed")
    try:
        module = import_module(NAME)
    # The published wheel raises ImportError without a driver, a broken library OSError, and so on.
    except Exception as error:
        _forget()
        reason = f"the installed one does not import: {type(error).__name__}: {_first_line(error)}"
        return _stand_in(0, reason)
    if _is_stand_in(module):
        return KernelPackage(False, module.__version__, "from the parent process")
    return KernelPackage(True, getattr(module, "__version__", "unknown"), "installed, and imports")


def _found() -> bool:
    """Whether a package is there; a folder without an __init__.py does not count."""
    if NAME in sys.modules:
        return True
    spec = find_spec(NAME)
    return spec is not None and spec.origin is not None


def _stand_in(position: int, reason: str) -> KernelPackage:
    sys.path.insert(position, str(FOLDER))
    invalidate_caches()
    module = import_module(NAME)
    if not _is_stand_in(module):
        raise ImportError(f"{NAME} should come from {FOLDER}, but came from {module.__file__}")
    return KernelPackage(False, module.__version__, reason)


def _is_stand_in(module: ModuleType) -> bool:
    return Path(module.__file__ or "").resolve().parent == (FOLDER / NAME).resolve()


def _forget() -> None:
    """Remove what a failed import left in sys.modules."""
    for name in [n for n in sys.modules if n == NAME or n.startswith(f"{NAME}.")]:
        del sys.modules[name]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
