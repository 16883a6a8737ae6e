"""Checkpoints named by a hub's id, for both engines."""

from functools import cache
from pathlib import Path


@cache
def local_folder(model: str, revision: str | None) -> Path:
    """The folder of a checkpoint; downloads one of a hub, which the engine would do next."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    files = snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"])
    return Path(files)
