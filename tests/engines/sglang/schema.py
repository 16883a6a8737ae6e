"""Answers held to a JSON schema, as /generate is asked for them."""

import json

from engines.clients import PROMPTS
from engines.schema import SCHEMA, check_schema
from engines.server import Server

TERSE = "--constrained-json-disable-any-whitespace"  # which a small model would never end


def follow_a_schema(server: Server, temperature: float) -> int:
    """Check an answer to each prompt; how many drafts were accepted."""
    params = {"temperature": temperature, "max_new_tokens": 200, "json_schema": json.dumps(SCHEMA)}
    answers = server.post("/generate", text=PROMPTS, sampling_params=params)
    for answer in answers:
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer
        check_schema(answer["text"])
    return sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
