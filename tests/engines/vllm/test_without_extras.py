"""Extras can be deleted: the core serves, and its contract with the engine holds."""

import pytest

from checkpoints import SHIPPED
from engines.vllm.server import Server
from engines.without_extras import check_answers, check_refused, check_suite, copy_without

FLAGS = (
    "--dtype",
    "float32",
    "--max-model-len",
    "512",
    "--speculative-config",
    '{"method": "mtp", "num_speculative_tokens": 2}',
    "--enforce-eager",
)
TESTS = ("tests/test_layering.py", "tests/engines/vllm/test_contract.py")
COMPLETED = """
import json, sys
from vllm.engine.arg_utils import EngineArgs

for flags in json.load(sys.stdin):
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


@pytest.mark.serve
def test_a_server_without_extras_answers(tmp_path):
    check_answers(Server(SHIPPED, *FLAGS, env=copy_without(tmp_path)))


def test_what_extras_serve_is_refused_by_name(tmp_path):
    transfer = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}
    missing = "the extra of qwen3next_plugin that serves it is not installed; "
    asked = [
        ({"kv_transfer_config": transfer}, f"kv_connector = NixlConnector: {missing}"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, f"nnodes = 2: {missing}"),
    ]
    here = {"model": str(SHIPPED)}
    check_refused(tmp_path, COMPLETED, [(here | flags, words) for flags, words in asked])
