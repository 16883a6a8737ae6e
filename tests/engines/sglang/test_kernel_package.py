"""Which `sgl_kernel` is imported: a genuine one where it imports, the stand-in else."""

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

import pytest

from qwen3next_plugin.engines.sglang.cpu.kernel_package import FOLDER

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
    print("\\n".join(queue.get(timeout=60)))
    process.join()
"""


def python(*arguments: str, path: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        cwd=path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def package(folder: Path, text: str, **modules: str) -> Path:
    (folder / "sgl_kernel").mkdir()
    (folder / "sgl_kernel" / "__init__.py").write_text(text)
    for name, source in modules.items():
        (folder / "sgl_kernel" / f"{name}.py").write_text(source)
    return folder


def installed() -> bool:
    """A genuine one; another test may have put the stand-in on this process's path."""
    elsewhere = [folder for folder in sys.path if folder != str(FOLDER)]
    return PathFinder.find_spec("sgl_kernel", elsewhere) is not None


def test_a_genuine_one_that_imports_is_left_alone(tmp_path):
    path = package(tmp_path, "__version__ = '9.8'")
    said = json.loads(python("-c", SAY, path=path))
    assert (said["genuine"], said["version"], said["added"]) == (True, "9.8", [])
    assert said["file"] == str(tmp_path / "sgl_kernel" / "__init__.py")
    assert "genuine, version 9.8" in said["said"]


@pytest.mark.skipif(installed(), reason="a genuine sgl_kernel is installed")
@pytest.mark.parametrize("namespace", [False, True], ids=["nothing", "folder without __init__"])
def test_without_one_the_stand_in_comes_last(tmp_path, namespace):
    if namespace:
        (tmp_path / "sgl_kernel").mkdir()
    said = json.loads(python("-c", SAY, path=tmp_path))
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
def test_one_that_fails_to_import_is_passed_over(tmp_path, failure):
    path = package(tmp_path, f"import sgl_kernel.genuine\n{failure}", genuine="")
    said = json.loads(python("-c", SAY, path=path))
    assert not said["genuine"]
    assert Path(said["file"]).parts[-3:-1] == ("stand_in", "sgl_kernel")
    assert (said["place"], said["stale"]) == (0, [])
    assert "does not import" in said["reason"]
    assert "\n" not in said["reason"]


def test_spawned_workers_find_it(tmp_path):
    path = package(tmp_path, "raise ImportError('no driver')")
    script = tmp_path / "main.py"
    script.write_text(SPAWN)
    file, said = python(str(script), path=path).splitlines()
    assert Path(file).parts[-3:-1] == ("stand_in", "sgl_kernel")
    assert "stand-in" in said


def test_amx_is_never_claimed(tmp_path):
    """SGLang asks for this operator to tell whether its AMX paths can run."""
    code = (
        "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide(); "
        "import torch; print(hasattr(torch.ops.sgl_kernel, 'convert_weight_packed'))"
    )
    assert python("-c", code, path=tmp_path).strip() == "False"


HOST_MODULES = (
    "kernels.ops.kvcache.cache_move",
    "kernels.ops.speculative.cache_locs",
    "kernels.ops.speculative.eagle",
    "kernels.ops.speculative.multi_layer_eagle",
    "kernels.ops.speculative.spec_tree",
    "srt.mem_cache.allocation",
    "srt.layers.attention.intel_amx_backend",
    "srt.layers.attention.linear.gdn_backend",
    "srt.layers.attention.linear.kda_backend",
    "srt.layers.attention.linear.kernels.gdn_triton",
    "srt.models.grok",
    "srt.models.muse_glimmer",
    "srt.models.qwen3_5",
    "srt.models.qwen3_next",
    "srt.models.qwen3_next_mtp",
)


@pytest.mark.skipif(find_spec("sglang") is None, reason="no sglang here")
def test_the_host_imports_what_takes_it_at_module_level(tmp_path):
    code = (
        "import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'\n"
        "from importlib import import_module\n"
        "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide()\n"
        f"for name in {HOST_MODULES}: import_module('sglang.' + name)\n"
        "from sglang.srt.utils import is_cpu; from sglang.srt.utils.common import "
        "_is_intel_amx_backend_available as amx; print(is_cpu(), amx())"
    )
    assert python("-c", code, path=tmp_path).split()[-2:] == ["True", "False"]


@pytest.mark.skipif(find_spec("sglang") is None, reason="no sglang here")
def test_the_host_registers_its_fakes_beside_ours(tmp_path):
    """What its CPU graph does first; torch refuses a second fake for one operator."""
    code = (
        "import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'\n"
        "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide()\n"
        "from sglang.srt.model_executor import cpu_graph_runner as graph\n"
        "graph.register_fake_ops(1); graph.register_inductor_fallback_ops()\n"
        "import torch\n"
        "op, one = torch.ops.sgl_kernel.decode_attention_cpu, torch.tensor([1])\n"
        "def step(q, cache, o):\n"
        "    op(q, cache, cache + 1, 1.0, 1.0, o, None, None, one, q, one[None].int(), one - 1,"
        " one, 0.5, 0.0, False, 0, None, None)\n"
        "    return o + 1\n"
        "def run(step):\n"
        "    cache = torch.arange(6.0).view(3, 1, 2)\n"
        "    return step(torch.ones(1, 1, 2), cache, torch.zeros(1, 1, 2)).tolist()\n"
        "print(run(step), run(torch.compile(step, backend='aot_eager', fullgraph=True)))"
    )
    assert python("-c", code, path=tmp_path).splitlines()[-1] == "[[[4.0, 5.0]]] [[[4.0, 5.0]]]"


@pytest.mark.skipif(find_spec("sglang") is None, reason="no sglang here")
def test_the_host_draws_seeded_coins(tmp_path):
    """Of a request with a seed: the same in every run, other ones at each position."""
    code = (
        "import os; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'\n"
        "from qwen3next_plugin.engines.sglang.cpu.kernel_package import provide; provide()\n"
        "import torch\n"
        "from sglang.srt.speculative.eagle_utils import _seeded_verify_coins as draw\n"
        "given = {'sampling_seed': torch.tensor([7] * 3), 'draft_token_num': 4, 'device': 'cpu'}\n"
        "coins, last = draw(seq_lens=torch.tensor([5, 5, 6]), **given)\n"
        "drawn = torch.cat([coins, last[:, None]], 1)\n"
        "print(tuple(drawn.shape), torch.equal(drawn[0], drawn[1]), drawn[1:].unique().numel(),"
        " bool(((drawn >= 0) & (drawn < 1)).all()))"
    )
    assert python("-c", code, path=tmp_path).splitlines()[-1] == "(3, 5) True 10 True"
