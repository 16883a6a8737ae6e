"""Two ranks of a server agree on which request has passed its budget of CPU time."""

import json

import pytest

from checkpoints import SHIPPED
from engines.hostile import ask
from engines.sglang.schema import TERSE, follow_a_schema
from engines.sglang.server import NEXTN, Forked
from needs import needs

pytestmark = [pytest.mark.serve, needs("two-cores")]


def test_two_ranks_end_a_dear_request_together():
    """Each measures its own time; after it both serve others."""
    small = ("--dtype", "float32", "--max-total-tokens", "8192", TERSE)
    server = Forked(SHIPPED, "--tp-size", "2", *NEXTN, "3", *small).wait()
    try:
        params = {"temperature": 1, "max_new_tokens": 300}
        for asked in (
            {"regex": "(((a{1,100}){1,100}){1,100}){40,100}"},
            {"json_schema": json.dumps({"enum": [f"{i}" * 20 for i in range(1000, 5000)]})},
            {"stop_regex": r"([\s\S]+)+\x00"},
        ):
            hostile = {"text": "a", "sampling_params": params | asked}
            status, text = ask(server, "/generate", hostile)
            assert (status, "of CPU time" in text) == (400, True), text
            follow_a_schema(server, 1)
    finally:
        server.close()
