"""Extras can be deleted: the core serves, and its contract with the engine holds."""

from types import SimpleNamespace as Bag

import pytest

from checkpoints import SHIPPED
from engines.vllm.server import Server
from engines.without_extras import (
    EXTRAS,
    check_answers,
    check_refusals,
    check_refused,
    check_suite,
    copy_without,
)
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines import extras
from qwen3next_plugin.engines.vllm.speculation.worker import Worker

FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--speculative-config",
    '{"method": "mtp", "num_speculative_tokens": 2}',
    "--enforce-eager",
)
TESTS = (
    *("tests/test_layering.py", "tests/test_cli.py", "tests/test_env.py"),
    "tests/engines/vllm/test_contract.py",
)
COMPLETED = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.executor import ray_utils

for flags in json.load(sys.stdin):
    if "distributed_executor_backend" in flags:
        ray_utils.ray = object()  # else vLLM asks for it
    try:
        EngineArgs(dtype="float32", max_model_len=512, **flags).create_engine_config()
    except Exception as error:
        print("answer:", *str(error).split())
    else:
        print("answer: served")
"""
LISTS = "test_lists_of_patches_are_up_to_date"  # which name the extras'


def test_the_contract_without_extras(tmp_path):
    check_suite(tmp_path, *TESTS, "-k", f"not {LISTS}")


def test_what_extras_have_is_refused(tmp_path):
    check_refusals(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("extra", EXTRAS)
def test_the_contract_without_one_extra(tmp_path, extra):
    check_suite(tmp_path, *TESTS, "-k", f"not {LISTS}", without=[extra])


@pytest.mark.serve
def test_a_server_without_extras_answers(tmp_path):
    check_answers(Server(SHIPPED, *FLAGS, env=copy_without(tmp_path)))


def test_no_other_weights_are_taken_while_serving(monkeypatch):
    """By one rank: vLLM would take what the others say for answers to its next call."""
    monkeypatch.setattr(extras, "reloader", lambda _: None)
    worker = Bag(rank=0, parallel_config=Bag(world_size=2))
    assert Worker.reload_weights(worker) is None
    worker.rank = 1
    with pytest.raises(ConfigError, match=r"reload_weights: the extra .*; restart the server"):
        Worker.reload_weights(worker)


def test_what_extras_serve_is_refused_by_name(tmp_path):
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    missing = "the extra of qwen3next_plugin that serves it is not installed; "
    asked = [
        ({"kv_transfer_config": transfer}, f"kv_connector = NixlConnector: {missing}"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, f"nnodes = 2: {missing}"),
        (
            {"distributed_executor_backend": "ray", "tensor_parallel_size": 2},
            f"--distributed-executor-backend ray: {missing}",
        ),
    ]
    here = {"model": str(SHIPPED)}
    check_refused(tmp_path, COMPLETED, [(here | flags, words) for flags, words in asked])
