"""Loading takes little more memory than the packed weights: there is never a second whole copy."""

import pytest

from engines.load_memory import (
    KINDS,
    Loaded,
    check,
    prepared,
    write_large,
    write_large_mtp,
)
from engines.vllm.offline import Offline

pytestmark = [pytest.mark.serve, pytest.mark.long]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_loading(plain, tmp_path, kind):
    folder, env = prepared(plain, tmp_path, kind)
    flags = {"dtype": "bfloat16", "max_model_len": 512}
    engine = Offline(folder, env=env, first="load_memory", **flags)
    try:
        check(kind, Loaded(*engine.inside("load_memory")))
    finally:
        engine.close()


def test_peak_of_loading_an_mtp_layer_in_bf16(tmp_path):
    """It is packed as int8, expert by expert."""
    folder, env = prepared(write_large_mtp(tmp_path / "mtp"), tmp_path, "bf16")
    drafts = {"method": "qwen3_next_mtp", "num_speculative_tokens": 2}
    flags = {"dtype": "bfloat16", "max_model_len": 512, "speculative_config": drafts}
    engine = Offline(folder, env=env, first="load_memory", **flags)
    try:
        check("MTP", Loaded(*engine.inside("load_memory")))
    finally:
        engine.close()
