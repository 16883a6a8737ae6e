"""A short name for the weights in a checkpoint's files, without reading them all."""

import os
from hashlib import sha256
from pathlib import Path

from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import read_index, weight_files

SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file: its start and so on, evenly to its end


def fingerprint(folder: Path, *, of_copies: bool = False) -> str:
    """A digest of each file's name, size, time of change and samples; a copy has another one.

    Args: of_copies: leave out the time, so that a copy on another machine has the same one.

    Raises:
        CheckpointError: there are no such files.
    """
    digest = sha256()
    files = weight_files(folder, read_index(folder))
    if not files:
        raise CheckpointError(f"{folder} has no safetensors files, by which weights are known")
    for path in files:
        with path.open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            changed = 0 if of_copies else found.st_mtime_ns
            digest.update(f"{path.name} {found.st_size} {changed}\n".encode())
            for i in range(SAMPLES):
                offset = max(0, found.st_size - SAMPLE_BYTES) * i // (SAMPLES - 1)
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, offset))
    return digest.hexdigest()[:16]
