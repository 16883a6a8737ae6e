"""Which backend runs: no silent fallback, one thread pool, one instruction set at a time."""

from collections.abc import Callable, Iterator

import pytest
import torch

from forks import Ended, Forks
from qwen3next_plugin.kernels import dispatch, native
from qwen3next_plugin.kernels.rms_norm import rms_norm


@pytest.fixture(scope="module")
def python() -> Iterator[Callable[..., Ended]]:
    """Runs code in a process that has imported an op, which loads no library yet."""
    forks = Forks("qwen3next_plugin.kernels.rms_norm")
    yield forks.run
    forks.close()


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_native_on_cpu(monkeypatch, asked):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", asked)
    assert dispatch.backend("rms_norm", "cpu") == "cpu"


def test_unsupported_device_is_named(monkeypatch):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "auto")
    x = torch.zeros(1, 4, device="meta")
    with pytest.raises(NotImplementedError, match=r"rms_norm: .* not on meta"):
        rms_norm(x=x, weight=x[0], eps=1e-6)


@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_triton_on_gpus(monkeypatch, asked):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", asked)
    assert dispatch.backend("rms_norm", "cuda") == "triton"
    with pytest.raises(NotImplementedError, match="fused_moe: there is no Triton kernel of it"):
        dispatch.backend("fused_moe", "cuda")


@pytest.mark.parametrize(
    ("asked", "device", "where"), [("triton", "cpu", "cuda"), ("cpu", "cuda", "cpu")]
)
def test_kernels_on_the_wrong_device(monkeypatch, asked, device, where):
    monkeypatch.setenv("QWEN3NEXT_KERNELS", asked)
    with pytest.raises(NotImplementedError, match=f"rms_norm: .* run on {where}, not on {device}"):
        dispatch.backend("rms_norm", device)


def test_an_op_of_a_gpu_is_traced_whole(python):
    """On CUDA an op has a kernel in torch's dispatcher, as on a CPU. Needs no GPU."""
    done = python(
        "import torch\n"
        "from qwen3next_plugin.kernels import dispatch\n"
        "dispatch.load('cuda')\n"
        "for name in ('rms_norm', 'qk_norm_rope', 'output_gate', 'gated_delta_rule'):\n"
        "    has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "    assert has(f'qwen3next::{name}', 'CUDA'), name\n"
        "op = dispatch.implementation('rms_norm', torch.device('cuda'))\n"
        "assert op is torch.ops.qwen3next.rms_norm.default, op",
        QWEN3NEXT_KERNELS="auto",
    )
    assert done.returncode == 0, done.stderr


def test_what_an_engine_loads_is_kept(monkeypatch):
    """Until one loads its ops anew."""
    device = torch.device("cpu")
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    dispatch.load("cpu")
    kept = {op: dispatch.implementation(op, device) for op in dispatch.OPS}
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    assert all(dispatch.implementation(op, device) is run for op, run in kept.items())
    dispatch.load("cpu")
    for op in dispatch.OPS:
        assert dispatch.implementation(op, device) is dispatch._LOADED["cpu", "cpu", op]


def test_what_the_next_engine_cannot_load_is_not_kept(python):
    done = python(
        "import os, torch\n"
        "from qwen3next_plugin.kernels import dispatch\n"
        "dispatch.load('cpu')\n"
        "os.environ |= {'QWEN3NEXT_KERNELS': 'triton', 'TRITON_INTERPRET': '1'}\n"
        "dispatch.load('cpu')\n"
        "print(dispatch.implementation('rms_norm', torch.device('cpu')).__module__)\n"
        "dispatch.implementation('linear', torch.device('cpu'))",
        QWEN3NEXT_KERNELS="cpu",
    )
    assert done.stdout.endswith("rms_norm.triton\n"), done.stdout
    assert "linear: there is no Triton kernel of it" in done.stderr


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_library_that_was_not_built(python, asked):
    done = python(
        "import torch\n"
        "from qwen3next_plugin.kernels import native\n"
        "native.LIBRARY = 'absent.so'\n"
        "from qwen3next_plugin.kernels.rms_norm import rms_norm\n"
        "rms_norm(x=torch.zeros(1, 4), weight=torch.zeros(4), eps=1e-6)",
        QWEN3NEXT_KERNELS=asked,
    )
    assert done.returncode != 0
    assert "not built" in done.stderr
    assert "QWEN3NEXT_KERNELS=reference" in done.stderr


def test_reference_needs_no_library(python):
    done = python(
        "import torch\n"
        "from qwen3next_plugin.kernels import native\n"
        "native.LIBRARY = 'absent.so'\n"
        "from qwen3next_plugin.kernels.rms_norm import rms_norm\n"
        "rms_norm(x=torch.zeros(1, 4), weight=torch.zeros(4), eps=1e-6)",
        QWEN3NEXT_KERNELS="reference",
    )
    assert done.returncode == 0, done.stderr


def test_highest_level_by_default(python):
    code = "from qwen3next_plugin.kernels import native; print(native.isa(), *native.levels())"
    chosen, *levels = python(code).stdout.split()
    assert levels[0] == "baseline"
    assert chosen == levels[-1]


def test_level_by_variable(python):
    code = "from qwen3next_plugin.kernels import native; print(native.isa())"
    assert python(code, QWEN3NEXT_ISA="baseline").stdout.strip() == "baseline"


def test_level_the_machine_lacks():
    before = native.isa()
    with pytest.raises(RuntimeError, match=r"instruction set sve .* available: baseline"):
        native.set_isa("sve")
    assert native.isa() == before


def test_one_openmp_runtime(python):
    done = python(
        "import torch\n"
        "from qwen3next_plugin.kernels.rms_norm import rms_norm\n"
        "rms_norm(x=torch.zeros(4096, 64), weight=torch.zeros(64), eps=1e-6)\n"
        "maps = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print(*(p for p in maps if any(f'lib{omp}' in p for omp in ('gomp', 'iomp', 'omp'))))",
        QWEN3NEXT_KERNELS="cpu",
    )
    assert len(done.stdout.split()) == 1, done.stdout
