"""Which `sgl_kernel` is imported: a genuine one where it imports, the stand-in else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forks import Forks
from needs import needs

SAY = """
import json, sys
from qwen3next_plugin.engines.sglang.cpu.kernel_package import FOLDER, provide
before = list(sys.path)
got = provide()
assert provide() == got
import sgl_kernel
print(json.dumps({
    "genuine": got.genuine, "version": got.version, "reason": got.reason, "said": str(got),
    "file": sgl_kernel.__file__, "added": [p for p in sys.path if p not in before],
    "place": sys.path.index(str(FOLDER)) if str(FOLDER) in sys.path else None,
    "stale": [n for n in sys.modules if n.startswith("sgl_kernel.") and "genuine" in n],
}))
"""
SPAWN = """
import multiprocessing
def child(queue):
    from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide
    import sgl_kernel
    queue.put((sgl_kernel.__file__, str(provide())))
if __name__ == "__main__":
    from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide
    provide()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print("\\n".join(queue.get(timeout=300)))
    process.join()
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """A process that has imported torch, but no `sgl_kernel`."""
    forks = Forks("torch")
    yield forks
    forks.close()


@pytest.fixture
def python(forks, tmp_path) -> Callable[[str], str]:
    """Runs code that finds the packages of `tmp_path` first; returns what it prints."""

    def run(code: str) -> str:
        here = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, os.getcwd())"
        done = forks.run(f"{here}\n{code}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def package(folder: Path, text: str, **modules: str) -> Path:
    (folder / "sgl_kernel").mkdir()
    (folder / "sgl_kernel" / "__init__.py").write_text(text)
    for name, source in modules.items():
        (folder / "sgl_kernel" / f"{name}.py").write_text(source)
    return folder


def test_a_genuine_one_that_imports_is_left_alone(tmp_path, python):
    package(tmp_path, "__version__ = '9.8'")
    said = json.loads(python(SAY))
    assert (said["genuine"], said["version"], said["added"]) == (True, "9.8", [])
    assert said["file"] == str(tmp_path / "sgl_kernel" / "__init__.py")
    assert "genuine, version 9.8" in said["said"]


@needs("stand-in")
@pytest.mark.parametrize("namespace", [False, True], ids=["nothing", "folder without __init__"])
def test_without_one_the_stand_in_comes_last(tmp_path, python, namespace):
    if namespace:
        (tmp_path / "sgl_kernel").mkdir()
    said = json.loads(python(SAY))
    assert not said["genuine"]
    assert Path(said["file"]).parts[-3:-1] == ("stand_in", "sgl_kernel")
    assert len(said["added"]) == 1
    assert said["place"] > 0
    assert "stand-in" in said["said"]
    assert "no other is installed" in said["said"]


FAILURES = {
    "ImportError": "raise ImportError('libcuda.so.1\\nand more')",
    "ZeroDivisionError": "1 / 0",
    "OSError": "import ctypes; ctypes.CDLL('/none.so')",
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_one_that_fails_to_import_is_passed_over(tmp_path, python, failure):
    package(tmp_path, f"import sgl_kernel.genuine\n{failure}", genuine="")
    said = json.loads(python(SAY))
    assert not said["genuine"]
    assert Path(said["file"]).parts[-3:-1] == ("stand_in", "sgl_kernel")
    assert (said["place"], said["stale"]) == (0, [])
    assert "does not import" in said["reason"]
    assert "\n" not in said["reason"]


def test_spawned_workers_find_it(tmp_path, python):
    package(tmp_path, "raise ImportError('no driver')")
    script = tmp_path / "main.py"
    script.write_text(SPAWN)
    as_a_script = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    file, said = python(as_a_script).splitlines()
    assert Path(file).parts[-3:-1] == ("stand_in", "sgl_kernel")
    assert "stand-in" in said


def test_amx_is_never_claimed(python):
    """SGLang asks for this operator to tell whether its AMX paths can run."""
    code = (
        "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide(); "
        "import torch; print(hasattr(torch.ops.sgl_kernel, 'convert_weight_packed'))"
    )
    assert python(code).strip() == "False"
