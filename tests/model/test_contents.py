"""Tensors are read from a checkpoint's files byte for byte, through the page cache or past it."""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.model.checkpoint import contents
from qwen3next_plugin.model.checkpoint.contents import BLOCK, PIECE
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import Header, Place

SIZES = (0, 1, BLOCK - 1, BLOCK, PIECE - 64, PIECE + 1, 2 * PIECE + 777)  # bytes
OFFSETS = (0, 8, 64, BLOCK, BLOCK + 1, 3 * BLOCK - 1)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Random bytes, on the disk, which end within a block."""
    path = tmp_path_factory.mktemp("contents") / "model.safetensors"
    with path.open("wb") as out:
        out.write(os.urandom(max(OFFSETS) + max(SIZES) + 8))
        out.flush()
        os.fsync(out.fileno())
    return path


@pytest.fixture
def past_cache(monkeypatch) -> None:
    monkeypatch.setattr(contents, "_outgrows", lambda folder: True)


def place(path: Path, offset: int, *shape: int, dtype: str = "U8") -> Place:
    return Place(path, offset, Header(dtype, shape))


def forget(path: Path) -> None:
    """Empty the page cache of a file."""
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(path: Path, offset: int) -> bool:
    with path.open("rb", buffering=0) as opened, suppress(BlockingIOError):
        return os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
    return False


def check_all(path: Path) -> None:
    whole = path.read_bytes()
    for offset in OFFSETS:
        for size in SIZES:
            found = contents.read(place(path, offset, size))
            assert found.numpy().tobytes() == whole[offset : offset + size], (offset, size)


def test_through_the_cache(file):
    check_all(file)


@pytest.mark.usefixtures("past_cache")
def test_past_the_cache(file):
    check_all(file)


@pytest.mark.usefixtures("past_cache")
def test_to_the_end_of_a_file(file):
    size = file.stat().st_size
    assert contents.read(place(file, 64, size - 64)).numpy().tobytes() == file.read_bytes()[64:]


@pytest.mark.usefixtures("past_cache")
@pytest.mark.parametrize("offset", [BLOCK + 64, BLOCK + 65], ids=["aligned", "between values"])
def test_values_and_shape(file, offset):
    found = contents.read(place(file, offset, 3, 5, dtype="BF16"))
    data = bytearray(file.read_bytes()[offset : offset + 30])
    want = torch.frombuffer(data, dtype=torch.bfloat16).view(3, 5)
    assert found.view(torch.uint8).equal(want.view(torch.uint8))
    assert found.dtype is torch.bfloat16


def test_kernels_find_it_aligned_as_in_the_file(file):
    assert contents.read(place(file, BLOCK + 64, PIECE)).data_ptr() % BLOCK == 64


@pytest.mark.usefixtures("past_cache")
def test_what_is_kept(file):
    """The page cache gets nothing of files that do not fit beside their weights; else all."""
    wanted = place(file, 64, PIECE)
    forget(file)
    if is_cached(file, BLOCK):
        pytest.skip("this file system keeps its files in memory")
    contents.read(wanted, shared=False)
    assert not is_cached(file, PIECE // 2)
    contents.read(wanted, shared=True)
    assert is_cached(file, PIECE // 2)


def test_what_fits(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for size, outgrows in (memory // 4, False), (memory // 4 * 3, True):
        os.truncate(path, size)  # nothing is written
        assert contents._outgrows.__wrapped__(tmp_path) is outgrows


@pytest.mark.parametrize("past", [False, True], ids=["through the cache", "past it"])
@pytest.mark.parametrize("left", [0, 100, BLOCK, PIECE + 100], ids=str)
def test_a_file_that_was_cut_short(tmp_path, monkeypatch, past, left):
    monkeypatch.setattr(contents, "_outgrows", lambda folder: past)
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(left))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, download it"):
        contents.read(place(path, 64, 2 * PIECE))
