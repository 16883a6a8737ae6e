"""Reads a checkpoint's JSON files, which may be damaged or hostile."""

import json
from pathlib import Path
from stat import S_ISREG
from typing import Any

# The largest file known, the index of a quantised model, has 34 MB and 300,000 values.
MOST_BYTES = 64 << 20
MOST_VALUES = 500_000
MOST_LEVELS = 50  # of nested objects and lists


def read_object(
    path: Path, error: type[ValueError], most_values: int = MOST_VALUES
) -> dict[str, Any]:
    """The object in a JSON file; what is too large is refused before it takes memory.

    Raises:
        error: names the file and what is wrong.
    """
    again = "it is truncated or damaged, fetch it again"
    try:
        found = path.stat()
        if not S_ISREG(found.st_mode):  # reading a pipe would wait for a writer
            raise ValueError("it is no regular file")
        if found.st_size > MOST_BYTES:
            raise ValueError(f"{found.st_size} bytes, and {MOST_BYTES} are the most")
        data = path.read_bytes()
        if sum(map(data.count, (b",", b"[", b"{"))) > most_values:
            raise ValueError(f"more than {most_values} values")
        value = json.loads(data)
        _check_levels(value)
    except PermissionError as reason:
        raise error(f"{path}: this user may not read it; change its owner or mode") from reason
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read ({reason}); {again}") from reason
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}, not an object; fetch it again")
    return value


def _check_levels(value: object) -> None:
    """Refuse deep nesting, which ends whatever walks through it: printing, comparing, copying."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_LEVELS):
        inside = (outer.values() if isinstance(outer, dict) else outer for outer in level)
        level = [inner for each in inside for inner in each if isinstance(inner, dict | list)]
        if not level:
            return
    raise ValueError(f"more than {MOST_LEVELS} levels")
