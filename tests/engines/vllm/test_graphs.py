"""Graphs that vLLM compiles on a CPU: without trials, and read by the next start."""

import inspect
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.convert_frame import fullgraph_capture
from torch._dynamo.package import SourceInfo
from torch._dynamo.utils import get_metrics_context
from torch._inductor.cpu_vec_isa import VecISA

from checkpoints import random_prompt
from engines.vllm.offline import Offline
from family import FAMILY
from qwen3next_plugin.engines.vllm.cpu import graphs

READ = "Directly load AOT compilation from path"
MTP = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return FAMILY["moe_HV=4H_top-3-of-12_5-layers"].write(tmp_path / "model")


def start(model: Path, **flags: Any) -> tuple[list[tuple[int, ...]], str]:
    """The answers of an engine with a cache beside the model, and its log."""
    env = {"VLLM_CACHE_ROOT": str(model.with_name("cache"))} | flags.pop("env", {})
    engine = Offline(
        model, env=env, dtype="bfloat16", max_model_len=256, enforce_eager=False, **flags
    )
    try:
        outputs = engine.greedy([random_prompt(n) for n in (20, 70)], 8)
        return [output.token_ids for output in outputs], engine.process.text()
    finally:
        engine.close()


def function_of(module: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The function of a module that has no other text."""
    module.write_text("def same():\n    return None\n")
    spec = spec_from_file_location(module.stem, module)
    loaded = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module.stem, loaded)
    spec.loader.exec_module(loaded)
    return loaded.same


@pytest.mark.serve
@pytest.mark.parametrize(
    "drafts",
    [pytest.param(None, marks=pytest.mark.long, id="plain"), pytest.param(MTP, id="drafts")],
)
def test_the_next_start_reads_them(model: Path, drafts: dict[str, Any] | None) -> None:
    """The trunk's, and the drafter's; neither start compiles a trial."""
    first, log = start(model, speculative_config=drafts)
    assert READ not in log
    again, log = start(model, speculative_config=drafts)
    assert log.count(READ) == (2 if drafts else 1)
    assert again == first
    compiled = [file.read_text() for file in model.with_name("cache").rglob("*.cpp")]
    assert compiled
    assert not any(VecISA._avx_code in source for source in compiled)


def test_a_source_is_added_as_torch_adds_it_and_looked_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, found, looked_for = SourceInfo(set()), SourceInfo(set()), []
    host = inspect.unwrap(SourceInfo.add_code)

    def add(info: SourceInfo, code: CodeType) -> None:
        looked_for.append(code)
        host(info, code)

    generated = eval("lambda: None").__code__  # has no module
    left, right = (
        function_of(tmp_path / f"{name}.py", monkeypatch).__code__ for name in ("left", "right")
    )
    assert left == right
    codes = [start.__code__, generated, left, right]
    for code in codes + codes:
        host(wanted, code)
        graphs.add_code(add, found, code)
    assert found == wanted
    assert {source.module for source in found.inlined_sources} == {__name__, "left", "right"}
    assert looked_for == codes


@pytest.mark.compat
def test_torch_looks_for_sources_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the patch of `SourceInfo.add_code` can be removed."""
    add, looked_for = inspect.unwrap(SourceInfo.add_code), []
    real = inspect.getsourcelines
    monkeypatch.setattr(inspect, "getsourcelines", lambda x: looked_for.append(x) or real(x))

    def helper(x: Tensor) -> Tensor:
        return x + 1

    with get_metrics_context():
        captured = fullgraph_capture(lambda x: helper(helper(x)), (torch.ones(2),))
    assert captured.graph_capture_output.traced_code.count(helper.__code__) == 2
    for code in (helper.__code__, helper.__code__):
        add(SourceInfo(set()), code)
    assert looked_for.count(helper.__code__) == 2


@pytest.mark.compat
def test_vllm_cannot() -> None:
    """Fails when the patch of `_try_load_aot_compiled_fn` can be removed."""
    from vllm.compilation import decorators

    assert f".{graphs.FINISH}(" in inspect.getsource(decorators._try_load_aot_compiled_fn)
    assert not hasattr(graphs.Graph, graphs.FINISH)
