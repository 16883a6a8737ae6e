"""Writes safetensors files whose tensors begin where kernels can read them, one after another.

The library's own function wants all tensors of a file in memory, and aligns none.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.model.checkpoint.files import STORED_DTYPES, nbytes
from qwen3next_plugin.model.checkpoint.headers import Header

ALIGNMENT = 4096  # of a file's first tensor
PIECE = 64 << 20  # bytes that are written at a time
DTYPES = {dtype: name for name, dtype in STORED_DTYPES.items()}
Wrote = Callable[[int], object]  # gets bytes


class Planned(NamedTuple):
    """A file before it is written: its tensors, in their order, and its metadata."""

    tensors: Mapping[str, Header]
    described: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        return sum(map(nbytes, self.tensors.values()))


@contextmanager
def written(path: Path, planned: Planned, wrote: Wrote) -> Iterator[Callable[[str, Tensor], None]]:
    """Write a file; within the context, the function takes its tensors, in any order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"} | dict(planned.described)}
    offsets, end = {}, 0
    for name, header in planned.tensors.items():
        offsets[name], end = end, end + nbytes(header)
        entries[name] = {
            "dtype": header.dtype,
            "shape": header.shape,
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)

    left = dict(planned.tensors)

    def write(name: str, tensor: Tensor) -> None:
        found = Header(DTYPES[tensor.dtype], tuple(tensor.shape))
        assert found == left.pop(name), f"{name}: {found}, not {planned.tensors[name]}"
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            file.seek(8 + len(text) + offsets[name] + start)
            file.write(piece)
            wrote(len(piece))

    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        yield write
        assert not left, f"{path.name}: not written: {', '.join(left)}"
        file.flush()
        os.fsync(file.fileno())
