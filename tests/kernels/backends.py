"""Fixtures of tests on every backend: the reference, each instruction set, and Triton."""

from dataclasses import replace
from platform import machine

import interpreter
import pytest
import torch

from needs import need
from qwen3next_plugin.kernels import native

OF_X86, OF_ARM = ("avx2", "avx512", "avx512bf16", "amx"), ("dotprod", "i8mm")
LEVELS = ("baseline", *(OF_ARM if machine() == "aarch64" else OF_X86))
# Of these tests, what other parameters show, too, and Triton's interpreter takes long for.
IN_TRITON: dict[str, dict[str, object]] = {
    "test_as_its_parts": {"dtype": torch.float32, "layout": "grouped"},  # bf16 is grouped, too
    "test_our_kernels_agree": {"dtype": torch.float32},
    "test_against_the_model": {"dtype": torch.float32, "gate": "sigmoid"},
}
OF_AMX = ("test_linear", "test_packed_moe", "test_paged_attention")


def by_tiles(
    stem: str, kind: str | None = None, dtype: torch.dtype = torch.bfloat16, **_: object
) -> bool:
    """Whether AMX multiplies in a test of such a file, with such weights and activations.

    int8 and int4, which tests of weights without a `kind` use, take tiles for every dtype.
    """
    integers = stem != "test_paged_attention" and (kind is None or kind.startswith("int"))
    if kind in ("nvfp4", "mxfp4"):
        return False
    return stem in OF_AMX and (integers or dtype == torch.bfloat16)


@pytest.hookimpl(tryfirst=True)  # before -m and --long select
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs in Triton's interpreter, a thousand times slower than compiled code, `slow`.

    There 1 and 65 tokens are a block's part, and a block and a part. More lengths, fp16, which is
    cast as bf16 is, and what IN_TRITON names, are marked `long`. So are bits on x86's instruction
    sets between the lowest and the highest, and of fp16 on the lowest, which casts it in software;
    avx512 but for bf16, as avx512bf16 has its code for other activations; and AMX where tiles are
    not used: there the code of avx512bf16 runs.
    """
    levels = [level for level in native.levels() if level != "amx"]
    between = set(levels[1:-1]).intersection(OF_X86)
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        dtype, bits_level = params.get("dtype", torch.bfloat16), params.get("bits_level")
        if bits_level in between or (bits_level == "baseline" and dtype == torch.float16):
            item.add_marker(pytest.mark.long)
        before_bf16 = "avx512" in params.values() and "avx512bf16" in levels
        if before_bf16 and dtype != torch.bfloat16:
            item.add_marker(pytest.mark.long)
        if "amx" in params.values() and not by_tiles(item.path.stem, **params):
            item.add_marker(pytest.mark.long)
        if params.get("backend") == "triton":
            item.add_marker(pytest.mark.slow)
            if params.get("T") in (63, 64, 200) or dtype == torch.float16:
                item.add_marker(pytest.mark.long)
            shown = IN_TRITON.get(item.originalname)
            if shown and shown.items() <= params.items():
                item.add_marker(pytest.mark.long)


@pytest.fixture(params=("reference", *LEVELS, "triton"))
def backend(request, monkeypatch):
    """The backend that runs: `reference`, `triton`, or an instruction set of the native kernels."""
    yield from _in_force(request.param, monkeypatch)


@pytest.fixture(params=("reference", *LEVELS))
def cpu_backend(request, monkeypatch):
    """For ops without Triton kernels, and for errors that only a CPU raises before it writes."""
    yield from _in_force(request.param, monkeypatch)


@pytest.fixture(params=LEVELS)
def native_level(request, monkeypatch):
    """Name of the instruction set that runs."""
    yield from _in_force(request.param, monkeypatch)


@pytest.fixture(params=LEVELS)
def bits_level(request, monkeypatch):
    """The same, where only bits are compared: others say whether an instruction set is right."""
    yield from _in_force(request.param, monkeypatch)


@pytest.fixture
def few(backend, size):
    """`few(some, all)`: only some in Triton's interpreter, unless --long asks for all."""
    return lambda some, all: size(some, all) if backend == "triton" else all


@pytest.fixture
def split_rows(monkeypatch):
    """Small sizes for Triton: rows of 33 tokens or more are split, at multiples of 32."""
    from qwen3next_plugin.kernels.gated_delta_rule import triton
    from qwen3next_plugin.kernels.gpu.configs import CONFIGS

    config = replace(CONFIGS["sm_90"], chunk=16, segment=32, split_from=33)
    monkeypatch.setattr(triton, "config_for", lambda device: config)
    return config


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Seed the inputs; fill uninitialised memory from torch with NaN."""
    torch.manual_seed(20)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _in_force(name, monkeypatch):
    if name == "reference":
        monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
        yield name
        return
    if name == "triton":
        monkeypatch.setenv("QWEN3NEXT_KERNELS", "triton")
        with interpreter.interpreting():
            yield name
        return
    if name != "baseline":
        need(name)
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "cpu")
    before = native.isa()
    native.set_isa(name)
    yield name
    native.set_isa(before)
