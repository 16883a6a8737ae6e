"""Loading takes little more memory than the packed weights: there is never a second whole copy."""

import json
from pathlib import Path

import pytest

from engines.load_memory import (
    KINDS,
    Loaded,
    check,
    prepared,
    write_large,
    write_large_mtp,
)
from engines.sglang.server import NEXTN, Forked

pytestmark = [pytest.mark.serve, pytest.mark.long]

FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "1024", "--max-mamba-cache-size", "4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_loading(plain, tmp_path, kind):
    folder, env = prepared(plain, tmp_path, kind)
    check(kind, loaded(folder, tmp_path / "found.json", env))


def test_peak_of_loading_an_mtp_layer_in_bf16(tmp_path):
    """It is packed as int8, expert by expert."""
    folder, env = prepared(write_large_mtp(tmp_path / "mtp"), tmp_path, "bf16")
    check("MTP", loaded(folder, tmp_path / "found.json", env, *NEXTN, "2"))


def loaded(folder: Path, found: Path, env: dict[str, str], *flags: str) -> Loaded:
    """What loading the last model of a server took."""
    server = Forked(folder, *FLAGS, *flags, env=env | {"TEST_LOAD_MEMORY": str(found)})
    try:
        server.wait()
        return Loaded(*json.loads(found.read_text()))
    finally:
        server.close()
