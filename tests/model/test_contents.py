"""Tensors are read from a checkpoint's files byte for byte, through the page cache or past it."""

import errno
import os
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


def place(path: Path, offset: int, *shape: int, dtype: str = "U8") -> Place:
    return Place(path, offset, Header(dtype, shape))


def forget(path: Path) -> None:
    """Empty the page cache of a file."""
    with path.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def is_cached(path: Path, offset: int) -> bool:
    """Skips the test where the system does not say; may read what is not cached from then on."""
    with path.open("rb", buffering=0) as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError as error:
            pytest.skip(f"no read that does not wait: {error}")


@pytest.fixture(params=[False, True], ids=["through the page cache", "past it"])
def past_cache(request) -> bool:
    return request.param


def test_bytes(file, past_cache):
    whole = file.read_bytes()
    for offset in OFFSETS:
        for size in SIZES:
            found = contents.read(place(file, offset, size), past_cache=past_cache)
            assert found.numpy().tobytes() == whole[offset : offset + size], (offset, size)


def test_to_the_end_of_a_file(file, past_cache):
    size = file.stat().st_size
    found = contents.read(place(file, 64, size - 64), past_cache=past_cache)
    assert found.numpy().tobytes() == file.read_bytes()[64:]


@pytest.mark.parametrize("offset", [BLOCK + 64, BLOCK + 65], ids=["aligned", "between values"])
def test_values_and_shape(file, offset, past_cache):
    found = contents.read(place(file, offset, 3, 5, dtype="BF16"), past_cache=past_cache)
    data = bytearray(file.read_bytes()[offset : offset + 30])
    want = torch.frombuffer(data, dtype=torch.bfloat16).view(3, 5)
    assert found.view(torch.int16).equal(want.view(torch.int16))
    assert found.dtype is torch.bfloat16


def test_kernels_find_it_aligned_as_in_the_file(file, past_cache):
    found = contents.read(place(file, BLOCK + 64, PIECE), past_cache=past_cache)
    assert found.data_ptr() % BLOCK == 64


def test_what_the_page_cache_keeps(file):
    """Nothing of what is read past it."""
    wanted, middle = place(file, 64, PIECE), PIECE // 2
    if (direct := contents._direct(file)) is None:
        pytest.skip("this file system has no direct reads")
    os.close(direct)
    forget(file)
    contents.read(wanted, past_cache=True)
    assert not is_cached(file, middle)
    contents.read(wanted)
    assert is_cached(file, middle)


@pytest.mark.parametrize("refused", ["open", "preadv"])
def test_a_file_system_without_direct_reads(file, monkeypatch, refused):
    """Some refuse to open a file so, some to read."""
    real_open, real_read = os.open, os.preadv
    direct = set()

    def open_(path, flags, *args):
        if refused == "open" and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        found = real_open(path, flags, *args)
        (direct.add if flags & os.O_DIRECT else direct.discard)(found)
        return found

    def preadv(file, *args):
        if file in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(file, *args)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", preadv)
    found = contents.read(place(file, 64, PIECE + 1), past_cache=True)
    assert found.numpy().tobytes() == file.read_bytes()[64 : 64 + PIECE + 1]


def test_reads_that_end_early(file, monkeypatch):
    """Not at the file's end: a file system may do so."""
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda f, into, at: real(f, [into[0][: BLOCK + 100]], at))
    found = contents.read(place(file, 64, 20 * BLOCK))
    assert found.numpy().tobytes() == file.read_bytes()[64 : 64 + 20 * BLOCK]


@pytest.mark.parametrize("left", [0, 100, BLOCK, PIECE + 100], ids=str)
def test_a_file_that_was_cut_short(tmp_path, past_cache, left):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(left))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated, download it"):
        contents.read(place(path, 64, 2 * PIECE), past_cache=past_cache)
