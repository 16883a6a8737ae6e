"""Answers held to a JSON schema, which a server asks its grammar backend to enforce."""

import json

from engines.clients import PROMPTS
from engines.server import Server

TERSE = "--constrained-json-disable-any-whitespace"  # which a small model would never end
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 999},
            "minItems": 2,
            "maxItems": 3,
        },
        "ok": {"type": "boolean"},
    },
    "required": ["name", "sizes", "ok"],
    "additionalProperties": False,
}


def follow_a_schema(server: Server, temperature: float) -> int:
    """Check an answer to each prompt; how many drafts were accepted."""
    params = {"temperature": temperature, "max_new_tokens": 200, "json_schema": json.dumps(SCHEMA)}
    answers = server.post("/generate", text=PROMPTS, sampling_params=params)
    for answer in answers:
        assert answer["meta_info"]["finish_reason"]["type"] == "stop", answer
        found = json.loads(answer["text"])
        assert found.keys() == SCHEMA["properties"].keys()
        assert len(found["name"]) <= 12
        assert 2 <= len(found["sizes"]) <= 3
        assert all(size in range(1000) for size in found["sizes"])
        assert type(found["ok"]) is bool
    return sum(answer["meta_info"]["spec_num_correct_drafts"] for answer in answers)
