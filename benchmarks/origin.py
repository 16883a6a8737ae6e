"""Where figures come from: the run, the commit, versions, and the machine."""

import os
import platform
import subprocess
import sysconfig
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.worker import SGLANG_PYTHON

ROOT = Path(__file__).parent.parent
FIGURES = ("docs", "README.md", "benchmarks/measured")  # what a run itself writes
PRODUCT = ("qwen3next_plugin", "kernels", "mtp", "CMakeLists.txt", "pyproject.toml", "requirements")
CHANGED = " and changes"  # behind the commit of a tree that has others
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")


def origin(run: str) -> dict[str, str]:
    """What all records of a run share."""
    cores = len(os.sched_getaffinity(0))
    return {
        "run": run,
        "commit": f"commit {commit()}",
        "plugin": f"plugin {version('qwen3next_plugin')}",
        "engines": f"vLLM {version('vllm')}, SGLang {version('sglang', sglang_packages())}",
        "torch": f"torch {version('torch')}, SGLang's {version('torch', sglang_packages())}",
        "processor": processor(),
        "flags": flags(),
        "cores": f"{cores} core{'s' * (cores > 1)}",
    }


def commit() -> str:
    """The tree's commit, and whether files differ from it, but for those that a run writes."""
    head = git("rev-parse", "--short=10", "HEAD")
    changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in FIGURES))
    return head + CHANGED if changed else head


def refuse_changes(source: Mapping[str, str]) -> None:
    """Exit if files differ from the commit of an origin."""
    if source["commit"].endswith(CHANGED):
        raise SystemExit("files differ from the commit: commit them, so that figures name a tree")


def same_product(one: str, other: str) -> bool:
    """Whether two commits, as `origin` names them, differ in nothing that figures are of."""
    commits = [name.removeprefix("commit ") for name in (one, other)]
    return one == other or not git("diff", "--name-only", *commits, "--", *PRODUCT)


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def version(package: str, folder: Path | None = None) -> str:
    """The version of a package that is installed here, or in another environment."""
    path = [str(folder or sysconfig.get_path("purelib"))]
    return next((found.version for found in distributions(name=package, path=path)), "none")


def sglang_packages() -> Path:
    """The packages of SGLang's environment."""
    lib = SGLANG_PYTHON.parent.parent / "lib"
    return next(lib.glob("python*/site-packages"), lib)


def processor() -> str:
    """Name, family and model: machines in a cloud have no other name."""
    found = cpuinfo()
    number = f"family {found.get('cpu family')} model {found.get('model')}"
    return f"{found.get('model name', platform.processor())} ({number})"


def flags() -> str:
    return " ".join(flag for flag in FLAGS if flag in cpuinfo().get("flags", "").split())


def cpuinfo() -> dict[str, str]:
    """What Linux says of the first core."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in first)}
