"""Where the files of a checkpoint are."""

from pathlib import Path
from typing import Any

from qwen3next_plugin.engines.hub import local_folder


def weights_folder(server_args: Any) -> Path:
    """The folder of the checkpoint that is served; downloads one of a hub."""
    model, downloads = server_args.model_path, server_args.download_dir
    return local_folder(model, server_args.revision, downloads)
