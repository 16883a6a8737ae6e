"""The safetensors files of a checkpoint: whether they are whole, and what their headers list."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from qwen3next_plugin.model.checkpoint.errors import CheckpointError

STORED_DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def check_files(folder: Path) -> None:
    """Refuse a folder with a cut-short safetensors file before anything is allocated.

    Raises:
        CheckpointError: naming the file, its size and the size its header promises.
    """
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        promised = _promised_size(path, size)
        if promised != size:
            raise CheckpointError(
                f"{path.name} has {size} bytes and its header promises {promised}: the file is "
                f"truncated or damaged; download it again"
            )


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, by name, without its data."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # other files may hold the same tensors again, under other names
        listed = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path for path in files if path.name in listed]
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it iterates no other way)
                header = file.get_slice(name)
                dtype = STORED_DTYPES.get(header.get_dtype(), torch.float32)
                yield name, torch.empty(header.get_shape(), dtype=dtype, device="meta")


def _promised_size(path: Path, size: int) -> int | str:
    """The length a safetensors file should have: 8 bytes, the header, the last tensor's end."""
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"a header of {header_size} bytes"
        try:
            header = json.loads(file.read(header_size))
        except ValueError:
            return "no readable header"
    ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
    return 8 + header_size + max(ends, default=0)
