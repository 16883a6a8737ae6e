"""The tensors of a checkpoint's files, without their data."""

from collections.abc import Iterator
from functools import cache
from math import prod
from pathlib import Path

import torch

from qwen3next_plugin.model.checkpoint.headers import Header, read_header, read_index, weight_files

STORED_DTYPES = {  # by their names in safetensors files
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def nbytes(header: Header) -> int:
    """Bytes of a tensor."""
    return prod(header.shape) * STORED_DTYPES[header.dtype].itemsize


def stored_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder's safetensors files, by name, without its data.

    Raises:
        CheckpointError: a damaged index or file.
    """
    for path in weight_files(folder, read_index(folder)):
        for name, (stored, shape) in read_header(path).items():
            yield name, without_data(shape, STORED_DTYPES.get(stored, torch.float32))


@cache
def without_data(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor that has a shape and a dtype only; cached, because files have thousands alike."""
    return torch.empty(shape, dtype=dtype, device="meta")
