"""Memory of mapped files that was read is given back, in runs of tensors side by side."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from page_faults import FEW, MANY
from qwen3next_plugin.model.checkpoint import mapped
from qwen3next_plugin.model.checkpoint.mapped import RUN, giving_back

TESTS = Path(__file__).parents[1]
COUNT, SIZE = 256, RUN // 16  # experts, and bytes of a projection


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Experts' weights, and their scales behind all weights."""
    tensors = {}
    for i in range(COUNT):
        tensors[f"{i:03}.packed"] = torch.full((SIZE // 4,), i, dtype=torch.int32)
        tensors[f"{i:03}.scale"] = torch.full((SIZE // 32,), i, dtype=torch.bfloat16)
    path = tmp_path_factory.mktemp("mapped") / "model.safetensors"
    save_file(tensors, path)
    os.sync()  # pages that are not on disk yet cannot be given back
    return path


@pytest.fixture
def advised(monkeypatch) -> list[tuple[int, int]]:
    """The ranges that Linux is asked to reclaim, in order."""
    found, tell = [], mapped._advise

    def advise(start: int, end: int, advice: int) -> None:
        found.append((start, end))
        tell(start, end, advice)

    monkeypatch.setattr(mapped, "_advise", advise)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return found


def resident() -> int:
    """Bytes of files on disk that this process has mapped and read.

    Those of a tmpfs are memory already: without swap, Linux cannot reclaim them.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssFile:")[2].split()[0]) << 10


def read(path: Path, names: list[str]) -> int:
    """Read tensors and give them back; returns the most that was resident meanwhile."""
    before, most = resident(), 0
    with safe_open(path, framework="pt") as tensors, giving_back() as done:
        for name in names:
            tensor = tensors.get_tensor(name)
            assert (tensor == int(name[:3])).all()
            done(tensor)
            most = max(most, resident() - before)
    return most


def in_order() -> list[str]:
    return [f"{i:03}.{part}" for i in range(COUNT) for part in ("packed", "scale")]


def test_tensors_side_by_side_are_given_back_together(file, advised):
    most = read(file, in_order())
    assert most < 4 * RUN < COUNT * SIZE / 2
    runs = COUNT * SIZE * 17 / 16 / RUN
    assert runs - 1 <= len(advised) <= runs + 2


def test_tensors_apart_are_given_back_one_by_one(file, advised):
    """From last to first, none begins where another one ends."""
    read(file, in_order()[::-1])
    assert len(advised) == 2 * COUNT


def test_the_last_are_given_back_when_reading_fails(file, advised):
    def fail():
        with safe_open(file, framework="pt") as tensors, giving_back() as done:
            done(tensors.get_tensor("000.packed"))
            assert not advised
            raise RuntimeError("fails")

    with pytest.raises(RuntimeError, match="fails"):
        fail()
    assert len(advised) == 1


def test_a_file_is_mapped_until_it_is_given_back(file, tmp_path, advised):
    """Engines read one file after the other, and the next may be mapped where the last one was."""
    shutil.copy(file, other := tmp_path / "other.safetensors")
    with giving_back() as done:
        for path in (file, other):
            with safe_open(path, framework="pt") as tensors:
                done(tensors.get_tensor("000.packed"))
        maps = Path("/proc/self/maps").read_text()
        assert file.name in maps
        assert other.name in maps
    assert len(advised) == 2


def test_nothing_is_given_back_beside_a_gpu(file, advised, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    read(file, in_order())
    assert not advised


def test_tensors_without_data_are_left_alone(advised):
    with giving_back() as done:
        done(torch.empty(RUN, dtype=torch.uint8, device="meta"))
    assert not advised


@pytest.mark.parametrize(
    ("variable", "kept"),
    [
        ("A=1", True),
        ("GLIBC_TUNABLES=glibc.rtld.nns=5", True),
        ("GLIBC_TUNABLES=glibc.rtld.nns=5:glibc.malloc.trim_threshold=131072", False),
        ("MALLOC_TRIM_THRESHOLD_=131072", False),
    ],
)
def test_freed_memory_is_kept(variable, kept):
    """Unless variables of malloc's say what is."""
    code = (
        "from page_faults import page_faults\n"
        "from qwen3next_plugin.model.checkpoint.mapped import keep_freed\n"
        "before = page_faults(); keep_freed(); print(before, page_faults())"
    )
    name, _, value = variable.partition("=")
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    env = {k: v for k, v in os.environ.items() if not k.startswith(others)} | {name: value}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=TESTS, env=env, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert before > MANY
    assert after < FEW if kept else after > MANY
