"""Answers held to a JSON schema, which an engine asks its grammar backend to enforce."""

import json

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


def check_schema(text: str) -> None:
    """The answer is such an object, whole."""
    found = json.loads(text)
    assert found.keys() == SCHEMA["properties"].keys()
    assert len(found["name"]) <= 12
    assert 2 <= len(found["sizes"]) <= 3
    assert all(size in range(1000) for size in found["sizes"])
    assert type(found["ok"]) is bool
