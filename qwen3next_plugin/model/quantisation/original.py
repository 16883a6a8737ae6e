"""Records what a checkpoint was packed from, and compares that if it still exists."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.config.json_files import read_object
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.fingerprint import hashes, states
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files
from qwen3next_plugin.model.checkpoint.progress import Say

RECORD = "packed_from.json"


def record(folder: Path, say: Say) -> dict[str, Any]:
    """A checkpoint's folder; size, time and SHA-256 of config.json and each weight file."""
    files = _files(folder)
    was, of = states(files), hashes(files, say)
    return {
        "folder": os.path.abspath(folder),
        "files": {name: [size, time, of[name]] for name, size, time in was},
    }


def changed(recorded: Mapping[str, Any], say: Say) -> str | None:
    """A file that differs from the record; None: none does, or the checkpoint is gone."""
    before = recorded["files"]
    with suppress(OSError):  # it cannot be read, as if it had gone
        files = _files(Path(recorded["folder"]))
        was = [(name, size, time) for name, (size, time, _) in before.items()]
        if files and states(files) != was:
            now = {*hashes(files, say).items()}
            differ = now ^ {(name, of) for name, (*_, of) in before.items()}
            return min(differ)[0] if differ else None
    return None


def refuse_changed(packed: Path, say: Say) -> None:
    """Refuse a packed checkpoint if its source still exists and has changed.

    Raises: ConfigError, CheckpointError, naming both and the fix.
    """
    file = packed / RECORD
    if not file.is_file():
        return
    recorded = read_object(file, CheckpointError)
    if not _is_record(recorded):
        raise CheckpointError(f"{file} is damaged; remove it, or pack the checkpoint again")
    if name := changed(recorded, say):
        raise ConfigError(
            f"{packed} was packed from {recorded['folder']}, where {name} has changed since: pack "
            f"it again, by `qwen3next pack`, or remove {file} to serve it as it is"
        )


def _is_record(found: Mapping[str, Any]) -> bool:
    match found:
        case {"folder": str(), "files": dict(files)}:
            kinds = [int, int, str]
            return all(isinstance(f, list) and [*map(type, f)] == kinds for f in files.values())
    return False


def _files(folder: Path) -> list[Path]:
    """config.json and the weight files; none if there are no weights."""
    with suppress(ValueError):  # the index is damaged
        weights = weight_files(folder, read_index(folder))
        return [folder / "config.json", *weights] if weights else []
    return []
