"""Metrics of MTP: a board for each engine of a server, read through vLLM's registry."""

import logging
from types import SimpleNamespace as Bag

import pytest
from prometheus_client import REGISTRY
from vllm.engine.arg_utils import EngineArgs

from family import FAMILY
from qwen3next_plugin.engines.vllm import metrics

DRAFTS = 2


@pytest.fixture
def config(tmp_path):
    """Of a server with two data-parallel engines."""
    yield EngineArgs(
        model=str(FAMILY["dense_HV=3H_wrapped_7-layers"].write(tmp_path)),
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        language_model_only=True,
        data_parallel_size=2,
        speculative_config={"method": "mtp", "num_speculative_tokens": DRAFTS},
    ).create_engine_config()
    metrics.remove()


def served(name: str, **labels: str) -> dict[str, float]:
    """The values of a sample by engine."""
    samples = (sample for family in REGISTRY.collect() for sample in family.samples)
    return {
        sample.labels["engine"]: sample.value
        for sample in samples
        if sample.name == metrics.PREFIX + name and labels.items() <= sample.labels.items()
    }


def test_each_engine_has_samples_of_its_own(config):
    paths = [metrics.board_path(config, engine) for engine in (0, 1)]
    boards = [metrics.create(path, DRAFTS) for path in paths]
    for steps, board in enumerate(boards, 3):
        board.add("steps", steps, "plain")
    assert served("steps_total", kind="plain") == {"0": 3, "1": 4}
    assert not any(path.exists() for path in paths)
    boards[1].add("steps", 5, "plain")
    assert served("steps_total", kind="plain") == {"0": 3, "1": 9}


@pytest.mark.parametrize("kind", ["missing", "no folder"])
def test_a_folder_that_cannot_be_written_turns_metrics_off(
    monkeypatch, tmp_path, config, caplog, kind
):
    """It ends no server. The log names the folder and the fix."""
    folder = tmp_path / "folder"
    if kind == "no folder":
        folder.touch()
    monkeypatch.setattr(metrics, "get_tp_group", lambda: Bag(rank_in_group=0))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    monkeypatch.setenv("TMPDIR", str(folder))
    metrics.install(config)
    metrics.worker_board(config).add("steps", value="plain")
    metrics.scheduler_board(config).add("drafts_skipped")
    assert "no metrics of the plugin" in caplog.text
    assert f"{folder}/qwen3next-metrics-" in caplog.text
    assert "set TMPDIR to another folder" in caplog.text
    assert not served("steps_total")
