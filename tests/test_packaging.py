"""What is installed where: one package, no top-level `kernels`, nothing heavy at import."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from needs import needs

ROOT = Path(__file__).parents[1]
PROCESSORS = {62: "x86_64", 183: "aarch64"}  # by their numbers in ELF


def python(code: str, **env: str) -> str:
    """Run code in a new interpreter, started away from the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["kernels", "mtp"])
def test_folder_is_no_regular_package(name):
    """A regular package of that name, Hugging Face's `kernels` say, wins over our folder."""
    assert (ROOT / name).is_dir()
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["kernels", "mtp"])
def test_another_package_of_that_name_is_found_from_the_checkout(tmp_path, name):
    other = tmp_path / name
    other.mkdir()
    (other / "__init__.py").write_text("whose = 'another'")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]; import {name}"
    assert python(f"{code}; print({name}.whose)") == "another"


def test_installed_modules_are_importable_under_the_package():
    modules = "kernels.dispatch", "mtp.policy", "model.step"
    code = "; ".join(f"import qwen3next_plugin.{module}" for module in modules)
    assert python(code) == ""


def test_importing_the_package_is_cheap():
    heavy = "[m for m in ('torch', 'vllm', 'transformers', 'numpy') if m in sys.modules]"
    assert python(f"import sys, qwen3next_plugin; print({heavy})") == "[]"


def test_entry_point_is_declared_once():
    points = [p for p in distribution("qwen3next-plugin").entry_points if "vllm" in p.group]
    assert [(p.group, p.value) for p in points] == [
        ("vllm.general_plugins", "qwen3next_plugin:register_vllm")
    ]


def test_version_is_one():
    import qwen3next_plugin

    assert distribution("qwen3next-plugin").version == qwen3next_plugin.__version__


@pytest.fixture
def library(tmp_path) -> Path:
    """The native kernels: those of the wheel WHEEL, else the installed ones."""
    if "WHEEL" in os.environ:
        with zipfile.ZipFile(os.environ["WHEEL"]) as archive:
            return Path(archive.extract("qwen3next_plugin/kernels/_ops.so", tmp_path))
    import qwen3next_plugin.kernels

    (found,) = (f for p in qwen3next_plugin.kernels.__path__ for f in Path(p).glob("_ops.so"))
    return found


@needs("binutils")
def test_the_library_exports_nothing_of_ours(library):
    """Another library's symbol of the same name would take the place of an exported one."""
    nm = ["nm", "-D", "-C", "--defined-only", library]
    symbols = subprocess.run(nm, capture_output=True, text=True, check=True).stdout.splitlines()
    ours = ("baseline", "avx2", "avx512", "avx512bf16", "amx", "dotprod", "i8mm", "native")
    assert not [line for line in symbols if any(f"{name}::" in line for name in ours)]


@needs("binutils")
def test_the_library_loads_where_manylinux_2_28_wheels_do(library):
    """It asks for no later symbols than the policy of that name in PEP 600's list has."""
    objdump = ["objdump", "-T", library]
    table = subprocess.run(objdump, capture_output=True, text=True, check=True).stdout
    asked = {
        (name, *map(int, number.split(".")))
        for name, number in re.findall(r"\b(GLIBC|GLIBCXX|CXXABI|GCC)_(\d[\d.]*)", table)
    }
    newest = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (8,)}
    assert {name for name, *_ in asked} >= {"GLIBC", "GLIBCXX"}
    assert not [one for one in asked if one[1:] > newest[one[0]]]


@needs("wheel")
def test_wheel_holds_the_package_and_nothing_at_the_top(library):
    architecture = PROCESSORS[int.from_bytes(library.read_bytes()[18:20], "little")]
    assert f"-py3-none-manylinux_2_28_{architecture}.whl" in os.environ["WHEEL"]
    with zipfile.ZipFile(os.environ["WHEEL"]) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"qwen3next_plugin"}
    assert "qwen3next_plugin/kernels/_ops.so" in names
    assert "qwen3next_plugin/mtp/policy.py" in names
    assert "qwen3next_plugin/engines/sglang/cpu/stand_in/sgl_kernel/tree.py" in names
    assert not [name for name in names if name.endswith((".cpp", ".h"))]
