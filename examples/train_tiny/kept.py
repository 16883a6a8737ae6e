"""Measurements that are kept: six digits, one entry a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def rounded(value: Any) -> Any:
    """The same with six significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


def keep(path: Path, entries: Mapping[str, Any]) -> None:
    """Write a JSON object, each of its entries on a line."""
    lines = (f"{json.dumps(name)}: {json.dumps(rounded(each))}" for name, each in entries.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
