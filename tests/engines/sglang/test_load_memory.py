"""Loading takes little more memory than the packed weights: there is never a second whole copy."""

import json

import pytest

from engines.load_memory import KINDS, ON_LINUX, Loaded, check, prepared, write_large
from engines.sglang.server import Forked

pytestmark = [pytest.mark.serve, pytest.mark.long, ON_LINUX]

FLAGS = ("--dtype", "bfloat16", "--max-total-tokens", "1024", "--max-mamba-cache-size", "4")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_large(tmp_path_factory.mktemp("large"))


@pytest.mark.parametrize("kind", KINDS)
def test_peak_of_loading(plain, tmp_path, kind):
    folder, env = prepared(plain, tmp_path, kind)
    found = tmp_path / "found.json"
    server = Forked(folder, *FLAGS, env=env | {"TEST_LOAD_MEMORY": str(found)})
    try:
        server.wait()
        check(kind, Loaded(*json.loads(found.read_text())))
    finally:
        server.close()
