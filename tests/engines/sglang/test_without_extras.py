"""Extras can be deleted: the core serves, and its contract with the engine holds."""

import json
from urllib.error import HTTPError

import pytest

from checkpoints import SHIPPED
from engines.sglang.server import NEXTN, Server
from engines.without_extras import check_answers, check_refused, check_suite, copy_without
from qwen3next_plugin.engines.extras import additions

FLAGS = (*NEXTN, "2")
TESTS = ("tests/engines/sglang/test_contract.py",)
COMPLETED = """
import json, sys
from sglang.srt.plugins import load_plugins

load_plugins()
from sglang.srt.server_args import ServerArgs

for flags in json.load(sys.stdin):
    try:
        ServerArgs(**flags).resolve_once()
    except Exception as error:
        print("answer:", *str(error).split())
    else:
        print("answer: served")
"""
LISTS = "test_lists_of_patches_are_up_to_date"  # which name the extras'


def test_the_contract_without_extras(tmp_path):
    check_suite(tmp_path, *TESTS, "-k", f"not {LISTS}")


@pytest.mark.long
@pytest.mark.parametrize("extra", sorted({name.split(".")[2] for name in additions("sglang")}))
def test_the_contract_without_one_extra(tmp_path, extra):
    check_suite(tmp_path, *TESTS, "-k", f"not {LISTS}", without=[extra])


@pytest.mark.serve
def test_a_server_without_extras_answers(tmp_path):
    check_answers(Server(SHIPPED, *FLAGS, env=copy_without(tmp_path)), check_weights_stay)


def check_weights_stay(server: Server) -> None:
    """It takes no other weights while it serves."""
    with pytest.raises(HTTPError) as refusal:
        server.post("/update_weights_from_disk", model_path=str(SHIPPED))
    message = json.load(refusal.value)["message"]
    assert message.endswith(
        "as a whole checkpoint loads; restart the server with the new checkpoint"
    )


def test_what_extras_serve_is_refused_by_name(tmp_path):
    missing = "the extra of qwen3next_plugin that serves it is not installed; leave it out"
    apart = {"disaggregation_mode": "prefill", "disaggregation_transfer_backend": "nixl"}
    linker = {
        "enable_unified_cache_external_linker": True,
        "unified_cache_external_linker_backend": "dynamic",
        "unified_cache_external_linker_config": {"linker": "FolderLinker"},
    }
    asked = [
        ({"nnodes": 2, "tp_size": 2}, f"--nnodes 2: {missing}"),
        ({"lora_paths": ["x=adapter"]}, f"--lora-paths .*: {missing}"),
        (apart, f"--disaggregation-mode prefill: {missing}"),
        (linker, f"--enable-unified-cache-external-linker: {missing}"),
    ]
    here = {"model_path": str(SHIPPED)}
    check_refused(tmp_path, COMPLETED, [(here | flags, words) for flags, words in asked])
