"""Where both engines' checkpoints are, and in which formats they are read."""

from contextlib import suppress
from functools import cache
from pathlib import Path

# Of an engine's load_format: those whose files we read ourselves, and those that the model's own
# loader reads, which packs weights as they come.
READ_HERE = ("auto", "safetensors")
READ_BY_MODEL = (
    *(*READ_HERE, "hf", "pt", "npcache", "mistral", "dummy"),
    *("fastsafetensors", "instanttensor", "runai_streamer"),
)
PACKED = "weights are packed as the model reads them"  # why a CPU reads no other format


@cache
def local_folder(model: str, revision: str | None, downloads: str | None = None) -> Path:
    """The folder of a checkpoint; downloads it from a hub, as the engine would do next.

    Args: downloads: the folder into which an engine downloads, unless it is the hub's own.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json"]
    found = snapshot_download(model, revision=revision, cache_dir=downloads, allow_patterns=wanted)
    return Path(found)


def folder_here(model: str, revision: str | None, downloads: str | None) -> Path | None:
    """The folder of a checkpoint if its files are on this machine; downloads nothing.

    Args: downloads: as for local_folder.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError):
        found = snapshot_download(
            model, revision=revision, cache_dir=downloads, local_files_only=True
        )
        return Path(found)
    return None
