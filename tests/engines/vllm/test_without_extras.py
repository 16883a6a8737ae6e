"""Extras can be deleted: the core serves, and its contract with the engine holds."""

import pytest

from checkpoints import SHIPPED
from engines.vllm.server import Server
from engines.without_extras import check_answers, check_refusals, check_suite, copy_without

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
LISTS = "test_lists_of_patches_are_up_to_date"  # which name the extras'


def test_the_contract_without_extras(tmp_path):
    check_suite(tmp_path, *TESTS, "-k", f"not {LISTS}")


def test_what_extras_have_is_refused(tmp_path):
    check_refusals(tmp_path)


@pytest.mark.serve
def test_a_server_without_extras_answers(tmp_path):
    check_answers(Server(SHIPPED, *FLAGS, env=copy_without(tmp_path)))
