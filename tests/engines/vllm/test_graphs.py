"""Graphs that vLLM compiles are read by the next start, on a CPU."""

import inspect
from pathlib import Path
from typing import Any

import pytest

from checkpoints import random_prompt
from engines.vllm.offline import Offline
from family import FAMILY
from qwen3next_plugin.engines.vllm.repairs import graphs

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


@pytest.mark.serve
@pytest.mark.parametrize(
    "drafts",
    [pytest.param(None, marks=pytest.mark.long, id="plain"), pytest.param(MTP, id="drafts")],
)
def test_the_next_start_reads_them(model: Path, drafts: dict[str, Any] | None) -> None:
    """The trunk's, and the drafter's."""
    first, log = start(model, speculative_config=drafts)
    assert READ not in log
    again, log = start(model, speculative_config=drafts)
    assert log.count(READ) == (2 if drafts else 1)
    assert again == first


@pytest.mark.compat
def test_vllm_cannot() -> None:
    """Fails when the patch `GRAPHS` can be removed."""
    from vllm.compilation import decorators

    assert f".{graphs.FINISH}(" in inspect.getsource(decorators._try_load_aot_compiled_fn)
    assert not hasattr(graphs.Graph, graphs.FINISH)
