"""Tensors are read from a checkpoint's files byte for byte, in one piece or in several."""

import os
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.model.checkpoint import contents
from qwen3next_plugin.model.checkpoint.contents import PIECE
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import Header, Place

SIZES = (0, 1, 4095, PIECE - 64, PIECE + 1, 2 * PIECE + 777)  # bytes
OFFSETS = (0, 8, 64, 4096, 4097)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Random bytes."""
    path = tmp_path_factory.mktemp("contents") / "model.safetensors"
    path.write_bytes(os.urandom(max(OFFSETS) + max(SIZES) + 8))
    return path


def place(path: Path, offset: int, *shape: int, dtype: str = "U8") -> Place:
    return Place(path, offset, Header(dtype, shape))


def test_bytes(file):
    whole = file.read_bytes()
    for offset in OFFSETS:
        for size in SIZES:
            found = contents.read(place(file, offset, size))
            assert found.numpy().tobytes() == whole[offset : offset + size], (offset, size)


def test_to_the_end_of_a_file(file):
    size = file.stat().st_size
    assert contents.read(place(file, 64, size - 64)).numpy().tobytes() == file.read_bytes()[64:]


@pytest.mark.parametrize("offset", [64, 65], ids=["aligned", "between values"])
def test_values_and_shape(file, offset):
    found = contents.read(place(file, offset, 3, 5, dtype="BF16"))
    data = bytearray(file.read_bytes()[offset : offset + 30])
    want = torch.frombuffer(data, dtype=torch.bfloat16).view(3, 5)
    assert found.view(torch.int16).equal(want.view(torch.int16))
    assert found.dtype is torch.bfloat16


def test_reads_that_end_early(file, monkeypatch):
    """Not at the file's end: a file system may do so."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, into, at: real(f, [into[0][:1000]], at))
    found = contents.read(place(file, 64, 20_000))
    assert found.numpy().tobytes() == file.read_bytes()[64:20_064]


@pytest.mark.parametrize("left", [0, 100, PIECE + 100], ids=str)
def test_a_file_that_was_cut_short(tmp_path, left):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(left))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, download it"):
        contents.read(place(path, 64, 2 * PIECE))
