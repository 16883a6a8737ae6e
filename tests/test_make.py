"""What `make` finds out about a machine: Python, compiler, torch; its errors; what it installs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
REAL = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
TOOLS = ("bash", "c++", "env", "find", "make", "touch")
APT = "sudo apt install make g++ python3-venv python3-dev libnuma1"
INDEX = "https://download.pytorch.org/whl/cpu"
GOOD = f'exec {REAL} "$@"'
TORCH = ROOT / "requirements" / "torch.txt"
PINS = dict(line.partition("==")[::2] for line in TORCH.read_text().splitlines())
HASH = re.compile("--hash=sha256:[0-9a-f]{64}")
CHOSEN = sorted((ROOT / "requirements").glob("*.in"))
NONE = "exit 127"  # as a version manager's shim, without that version
NO_VENV = f'PYTHONPATH=../broken exec {REAL} "$@"'


@pytest.fixture
def machine(tmp_path):
    """A checkout and a PATH without any Python; `add` adds one: a script that runs the real one."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for tool in TOOLS:
        if found := shutil.which(tool):
            (bin / tool).symlink_to(found)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "requirements", "kernels", "CMakeLists.txt", "pyproject.toml"):
        (checkout / name).symlink_to(ROOT / name)

    class Machine:
        def __init__(self) -> None:
            self.checkout = checkout

        def add(self, name: str, script: str = GOOD) -> None:
            (bin / name).write_text(f"#!/bin/bash\n{script}\n")
            (bin / name).chmod(0o755)

        def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
            env = {"PATH": str(bin)} | env
            return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)

    return Machine()


def test_another_system(machine):
    done = machine.run("bash", "-c", "OSTYPE=darwin24; . requirements/python.sh python3.13")
    assert done.returncode == 1
    assert done.stderr == "The engines' CPU builds are for Linux (on Windows: WSL)\n"


def test_a_full_disk(machine, tmp_path):
    """By what Python says of the disk."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "sitecustomize.py").write_text(
        "import shutil, types\nshutil.disk_usage = lambda path: types.SimpleNamespace(free=3.5e9)\n"
    )
    machine.add("python3.13", f'PYTHONPATH=../full exec {REAL} "$@"')
    done = machine.run("requirements/python.sh", "python3.13")
    assert done.returncode == 1
    assert "An environment takes 4 GB here (make test: 8), and 3.5 GB are free" in done.stderr


ALL_OF_SGLANG = ["tests/engines/sglang", "tests/extras/fleet/sglang"]


@pytest.mark.parametrize(
    ("extra", "vllm", "sglang", "left_out"),
    [
        ((), ["tests"], ALL_OF_SGLANG, False),
        (("EXTRA=",), ["tests"], ["tests/engines/sglang"], True),
        (("EXTRA=fleet",), ["tests/extras/fleet"], ["tests/extras/fleet/sglang"], False),
        (("EXTRA=pack",), ["tests/extras/pack"], None, False),
    ],
    ids=str,
)
def test_the_tests_of_an_extra(machine, extra, vllm, sglang, left_out):
    for folder in ("engines/sglang", "extras/fleet/sglang", "extras/pack"):
        (machine.checkout / "tests" / folder).mkdir(parents=True)
    done = machine.run("make", "--dry-run", "test", *old("vllm"), *old("sglang"), *extra)
    assert done.returncode == 0, done.stderr
    runs = [line for line in done.stdout.splitlines() if " -m pytest " in line]
    for engine, paths in (("vllm", vllm), ("sglang", sglang)):
        of_engine = [run for run in runs if f".venv-{engine}/" in run]
        assert len(of_engine) == (0 if paths is None else 2)
        for run in of_engine:
            assert f"testpaths='{' '.join(paths)}'" in run
            assert ("--ignore tests/extras" in run) == left_out


def old(engine):
    """Options for `make` that take this environment for made."""
    return ("--old-file", f".venv-{engine}/.plugin")


def test_an_unknown_extra(machine):
    (machine.checkout / "tests" / "extras" / "pack").mkdir(parents=True)
    done = machine.run("make", "--dry-run", "test", *old("vllm"), *old("sglang"), "EXTRA=nope")
    assert "EXTRA is one of pack, not nope" in done.stderr


def test_an_extra_that_an_engine_has_no_tests_of(machine):
    (machine.checkout / "tests" / "extras" / "pack").mkdir(parents=True)
    done = machine.run("make", "--dry-run", "test", *old("sglang"), "EXTRA=pack", "ENGINE=sglang")
    assert "EXTRA=pack has no tests with sglang" in done.stderr


@pytest.mark.parametrize("name", [*"'\"`()[]{}<>&|;*?!#$\\: ", "plain", "jürgen+a,b@c=d%e~f-g"])
def test_a_path_that_make_or_a_shell_takes_apart_is_named(tmp_path, name):
    checkout = tmp_path / f"a{name}b"
    checkout.mkdir()
    (checkout / "Makefile").symlink_to(ROOT / "Makefile")
    done = subprocess.run(["make", "help"], cwd=checkout, capture_output=True, text=True)
    if len(name) > 1:
        assert done.returncode == 0
        return
    assert done.returncode == 2
    named = "a space" if name == " " else name
    assert f'the path "{checkout}" has {named}, which make, shells and' in done.stderr


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        pytest.param({"python3.13": GOOD}, "python3.13", id="the only one"),
        pytest.param({"python3.12": GOOD, "python3.11": GOOD}, "python3.11", id="3.11 first"),
        pytest.param({"python3.11": NONE, "python3.12": GOOD}, "python3.12", id="a shim of none"),
        pytest.param({"python3.11": NO_VENV, "python3.13": GOOD}, "python3.13", id="without venv"),
    ],
)
def test_python(machine, tmp_path, pythons, chosen):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "ensurepip.py").write_text("raise ImportError")
    for name, script in pythons.items():
        machine.add(name, script)
    done = machine.run("requirements/python.sh", "python3.11", "python3.12", "python3.13")
    assert done.stdout == f"{chosen}\n", done.stderr


def test_make_uses_it(machine, tmp_path):
    """A rule that ends before anything is installed."""
    machine.add("python3.13")
    done = machine.run("make", ".venv-vllm/bin/python")
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "checkout" / ".venv-vllm" / "pyvenv.cfg").read_text()
    assert f"home = {REAL.parent}" in config


@pytest.mark.parametrize(
    ("env", "asked", "complaint"),
    [
        pytest.param({}, (), "No Python 3.11, 3.12 or 3.13", id="no Python"),
        pytest.param({}, ("PYTHON=python3.9",), "tried python3.9", id="not the one asked for"),
        pytest.param({"CXX": "missing"}, (), "No C++20 compiler: missing", id="no compiler"),
    ],
)
def test_what_is_missing_is_named_in_one_line(machine, env, asked, complaint):
    done = machine.run("make", "setup", *asked, **env)
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert ours
    assert all(complaint in line and APT in line for line in ours)


def test_what_test_arm_lacks_is_named_in_one_line(machine):
    done = machine.run(str(ROOT / "tests" / "arm" / "root.sh"), "make", "root")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("No aarch64-linux-gnu-g++. On Debian: apt install arch-test ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def pip_finds(tmp_path):
    """Run cpu_torch.py where pip's own index, and the other one, list these builds of torch."""
    tag = "py3-none-any"

    def index(name: str, builds: list[str]) -> str:
        for package in ("torch", "torchvision"):
            folder = tmp_path / name / package
            folder.mkdir(parents=True)
            wheels = [f"{package}-{PINS[package]}{build}" for build in builds]
            wheels = [w if w.endswith(".whl") else f"{w}-{tag}.whl" for w in wheels]
            (folder / "index.html").write_text("".join(f'<a href="{w}">{w}</a>' for w in wheels))
        return (tmp_path / name).as_uri()

    def run(own: list[str], other: list[str] | None) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env = clean | {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index("own", own)}
        others = [] if other is None else [index("other", other)]
        script = ROOT / "requirements" / "cpu_torch.py"
        command = [sys.executable, str(script), str(TORCH), *others]
        return subprocess.run(command, env=env, capture_output=True, text=True)

    return run


LONG = pytest.mark.long
OLD_PYTHON = "+cpu-cp39-cp39-manylinux_2_28_x86_64.whl"


@pytest.mark.parametrize(
    ("own", "other", "option"),
    [
        pytest.param(["+cpu"], ["+cpu"], False, id="pip's own index has it", marks=LONG),
        pytest.param(["+cpu", ""], None, False, id="the CPU build wins over the plain one"),
        pytest.param([""], ["+cpu"], True, id="pip's own has CUDA builds"),
        pytest.param([], ["+cpu"], True, id="pip's own has none", marks=LONG),
        pytest.param(["", OLD_PYTHON], ["+cpu"], True, id="pip's own has it for another Python"),
    ],
)
def test_the_cpu_build_of_torch_is_found(pip_finds, tmp_path, own, other, option):
    done = pip_finds(own, other)
    expected = f"--extra-index-url={(tmp_path / 'other').as_uri()}" if option else ""
    assert (done.returncode, done.stdout) == (0, f"{expected}\n"), done.stderr


@pytest.mark.parametrize(
    ("own", "other"),
    [
        pytest.param([""], [""], id="CUDA builds only", marks=LONG),
        pytest.param([], [OLD_PYTHON], id="another Python's"),
        pytest.param([""], None, id="no other index"),
        pytest.param(["+cpu", "+cu130"], None, id="pip would take another build"),
    ],
)
def test_no_cpu_build_is_one_error(pip_finds, own, other):
    done = pip_finds(own, other)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert f"No CPU build of torch {PINS['torch']}" in line
    assert "TORCH_INDEX" in line


def lines(requirements: Path) -> list[str]:
    joined = requirements.read_text().replace("\\\n", "")
    return [line for line in joined.splitlines() if not line.startswith("#")]


def pins(requirements: list[str]) -> set[tuple[str, str, str]]:
    """Name, version and marker of each."""
    parsed = map(Requirement, requirements)
    return {(canonicalize_name(r.name), str(r.specifier), str(r.marker)) for r in parsed}


@pytest.mark.parametrize("chosen", CHOSEN, ids=lambda path: path.stem)
def test_a_lock_has_hashes_of_all_that_is_chosen(chosen):
    """`make lock` writes it. torch.txt is no such lock, and says why."""
    locked = [line.split() for line in lines(chosen.with_suffix(".txt"))]
    hashes = [[word for word in words if HASH.fullmatch(word)] for words in locked]
    assert all(hashes)
    rest = [" ".join(word for word in words if not word.startswith("--hash")) for words in locked]
    assert pins(rest) == pins(lines(chosen))


SMALL = {
    "small.py": "",
    "small-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
    "small-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "small-1.0.dist-info/RECORD": "",
}


def test_make_installs_only_files_of_the_locked_hash(machine, tmp_path):
    """With the real pip; one package stands for all."""
    wheel = tmp_path / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in SMALL.items():
            archive.writestr(name, text)
    checkout = tmp_path / "checkout"
    (checkout / "requirements").unlink()
    shutil.copytree(ROOT / "requirements", checkout / "requirements")
    machine.add("python3.11")
    assert machine.run("make", ".venv-vllm/bin/python").returncode == 0

    def install(hash: str) -> tuple[int, str]:
        (checkout / "requirements" / "dev.txt").write_text(f"small==1.0 {hash}\n")
        env = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
        done = machine.run("make", "-o", ".venv-vllm/.host", ".venv-vllm/.dev", **env)
        return done.returncode, done.stderr

    code, error = install(f"--hash=sha256:{'0' * 64}")
    assert code == 2
    assert "DO NOT MATCH THE HASHES" in error
    assert "small==1.0" in error
    code, error = install("")
    assert code == 2
    assert "Hashes are required" in error
    assert not list(checkout.rglob("small.py"))
    assert install(f"--hash=sha256:{sha256(wheel.read_bytes()).hexdigest()}")[0] == 0
    assert list(checkout.rglob("small.py"))


def test_the_makefile_asks_for_torch_before_it_installs(machine):
    machine.add("python3.11")
    plan = machine.run("make", "-n", "setup").stdout
    assert plan.count(INDEX) == 2  # one for each engine
    own = machine.run("make", "-n", "setup", "TORCH_INDEX=file:///mirror").stdout
    assert own.count("file:///mirror") == 2
    assert INDEX not in own


def test_make_leaves_the_cores_to_the_plugin(machine):
    """It computes them with the flags at hand, as under plain `vllm serve`."""
    machine.add("python3.11")
    done = machine.run("make", "--eval", "show: ; env", "show")
    assert "VLLM_CPU_KVCACHE_SPACE" not in done.stdout
    assert "THREADS_BIND" not in done.stdout
