"""Damaged and hostile headers and indexes end in one CheckpointError, which names the file."""

import contextlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import BASE, write_checkpoint
from damage import damaged, header_of, little_memory, write_file
from quantised import write_quantised
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import (
    INDEX,
    check_files,
    read_header,
    read_index,
    weight_files,
)
from qwen3next_plugin.model.checkpoint.reading import check_stored
from qwen3next_plugin.model.quantisation.files import formats_of, plain_modules_of

TENSOR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SMALL = {"num_hidden_layers": 4, "num_experts": 3}
CONFIG = Qwen3NextConfig.from_hf(BASE | SMALL)
MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A checkpoint with an index."""
    folder = write_checkpoint(tmp_path_factory.mktemp("whole"), **SMALL)
    names = read_header(folder / MODEL)
    index = {"metadata": {"total_size": 10**6}, "weight_map": dict.fromkeys(names, MODEL)}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def document(whole):
    """The header of its file, and the bytes behind it."""
    return header_of(whole / MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("damaged")


def check(folder: Path) -> None:
    """What an engine does before it reads."""
    check_stored(folder, CONFIG, quantised=False, formats=None, with_mtp=True)


def test_the_checkpoint_is_whole(whole):
    check(whole)
    check_files(whole)


# headers ------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_a_header_holds_nothing_else_is_raised(folder, document, data):
    header, size = document
    write_file(folder / MODEL, data.draw(damaged(header)), size)
    with little_memory(), contextlib.suppress(CheckpointError):
        check(folder)


@settings(deadline=None, max_examples=200)
@given(place=st.floats(0, 1, exclude_max=True), bits=st.integers(1, 255), cut=st.integers(0, 9))
def test_whatever_bit_of_a_header_flips_nothing_else_is_raised(whole, folder, place, bits, cut):
    data = bytearray((whole / MODEL).read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    data[int(place * length)] ^= bits
    (folder / MODEL).write_bytes(data[: len(data) - cut])
    with little_memory(), contextlib.suppress(CheckpointError):
        check(folder)


@pytest.mark.parametrize(
    "header",
    [
        [TENSOR],
        5,
        None,
        {"a": 3},
        {"a": []},
        {"a": None},
        {"a": TENSOR | {"data_offsets": ["0", "8"]}},
        {"a": TENSOR | {"data_offsets": [-8, 0]}},
        {"a": TENSOR | {"data_offsets": [8, 0]}},
        {"a": TENSOR | {"data_offsets": [0]}},
        {"a": TENSOR | {"data_offsets": [0, 2**70]}},
        {"a": TENSOR, "b": TENSOR},  # overlapping
        {"a": TENSOR | {"shape": [4], "data_offsets": [0, 16]}},  # beyond the end
        {"a": TENSOR | {"shape": [3]}},
        {"a": TENSOR | {"shape": "2"}},
        {"a": TENSOR | {"shape": [-2]}},
        {"a": TENSOR | {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
        {"a": TENSOR | {"shape": [1] * 5000 + [2]}},
        {"a": TENSOR | {"dtype": "F99"}},
        {"a": TENSOR | {"dtype": 5}},
        {"a": {"dtype": "F32"}},
        {"a": TENSOR, "__metadata__": ["pt"]},
        b'{"a": ' + b"[" * 10**5,
        b"\xff\xff",
        b"",
    ],
    ids=lambda header: repr(header)[:60],
)
def test_the_file_with_a_damaged_header_is_named(tmp_path, header):
    write_file(tmp_path / MODEL, header, 0 if "[0, 0]" in repr(header) else 8)
    with (
        little_memory(),
        pytest.raises(CheckpointError, match=r"model\.safetensors.* damaged, dow"),
    ):
        read_header(tmp_path / MODEL)


READ = """
import resource, sys
from pathlib import Path
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.headers import read_header

used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (used + 100_000_000,) * 2)  # a mapped file is none
for path in sys.argv[1:]:
    try:
        read_header(Path(path))
    except CheckpointError as error:
        print(error)
"""


def test_a_flipped_length_reads_nothing(tmp_path, document):
    """By a process that gets no more than 100 MB, whoever allocates them."""
    header, size = document
    right = len(json.dumps(header).encode())
    paths = []
    for bit in (*range(20, 64), None):
        paths.append(tmp_path / f"{bit}.safetensors")
        wrong = 2**64 - 1 if bit is None else right ^ 1 << bit
        write_file(paths[-1], header, size, length=wrong)
    sparse = tmp_path / "sparse.safetensors"  # as long as the header says
    write_file(sparse, header, 2**33, length=2**33)
    command = [sys.executable, "-c", READ, *map(str, (*paths, sparse))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("download it again") == len(paths) + 1


@pytest.mark.parametrize("kind", ["folder", "absent", "dangling"])
def test_what_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / MODEL
    if kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not there, or no file"):
        read_header(path)


# the index ----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_whatever_an_index_holds_nothing_else_is_raised(whole, folder, data):
    index = json.loads((whole / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(data.draw(damaged(index))))
    (folder / MODEL).write_bytes((whole / MODEL).read_bytes())
    with little_memory(), contextlib.suppress(CheckpointError):
        check(folder)
    (folder / INDEX).unlink()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ([], "holds a list, not an object"),
        ({}, "weight_map = None: must name the file of each tensor"),
        ({"weight_map": ["a"]}, r"weight_map = \['a'\]: must name"),
        ({"weight_map": {}}, "weight_map = {}: must name"),
        ({"weight_map": {"a": 5}}, "weight_map: 'a' = 5: must be a file of the same folder"),
        ({"weight_map": {"a": None}}, "weight_map: 'a' = None: must be a file"),
        ({"weight_map": {"a": "../model.safetensors"}}, r"'\.\./model\.safetensors': must be a fi"),
        ({"weight_map": {"a": "/etc/passwd"}}, "'/etc/passwd': must be a file of the same folder"),
        ({"weight_map": {"a": ".."}}, r"'\.\.': must be a file of the same folder"),
        ({"weight_map": {"a": "x"}, "metadata": [1]}, r"metadata = \[1\]: must be an object"),
        ({"weight_map": {"a": "x"}, "metadata": {"total_size": "9"}}, "total_size = '9': must be"),
        ({"weight_map": {"a": "x"}, "metadata": {"total_size": True}}, "total_size = True: must"),
        ({"weight_map": {"a": "x"}, "metadata": {"total_size": 0}}, "total_size = 0: must be posi"),
    ],
    ids=str,
)
def test_what_is_wrong_with_an_index_is_named(tmp_path, index, message):
    (tmp_path / INDEX).write_text(json.dumps(index))
    path = re.escape(str(tmp_path / INDEX))
    with pytest.raises(CheckpointError, match=f"^{path}.*{message}"):
        read_index(tmp_path)


@pytest.mark.parametrize("metadata", ["absent", None, {}, {"total_size": None}])
def test_an_index_without_a_total_is_whole(tmp_path, metadata):
    index = {"weight_map": {"a": MODEL}} | ({} if metadata == "absent" else {"metadata": metadata})
    (tmp_path / INDEX).write_text(json.dumps(index))
    write_file(tmp_path / MODEL, {"a": TENSOR}, 8)
    write_file(tmp_path / "other.safetensors", [], 0)  # not listed, so not read
    found = read_index(tmp_path)
    assert (found.files, found.total_size) == ({"a": MODEL}, None)
    assert weight_files(tmp_path, found) == [tmp_path / MODEL]
    check_files(tmp_path)


# tensors of quantised checkpoints -----------------------------------------------------------------

DTYPES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I32": 4, "I64": 8, "I8": 1, "U8": 1}


@pytest.fixture(scope="module")
def headers(tmp_path_factory):
    """Of quantised checkpoints, by their kind; and their config's quantization_config."""
    plain = write_checkpoint(tmp_path_factory.mktemp("plain"), hidden_size=160, **SMALL)
    found = {}
    for kind in ("fp8-blocks", "int8-rows", "gptq_zeros", "awq", "packed_4-bit_zeros"):
        folder, _ = write_quantised(plain, tmp_path_factory.mktemp(kind), kind)
        raw = json.loads((folder / "config.json").read_text())
        found[kind] = read_header(folder / MODEL), raw
    return found


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A whole file of zeros."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + DTYPES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    write_file(path, header, end)


@settings(deadline=None, max_examples=75)
@given(data=st.data())
def test_whatever_the_tensors_of_a_module_are_nothing_else_is_raised(headers, folder, data):
    """Whole files, in which a tensor has another dtype or shape, or is missing."""
    kind = data.draw(st.sampled_from(sorted(headers)))
    header, raw = headers[kind]
    tensors = {name: tuple(entry) for name, entry in header.items()}
    config = Qwen3NextConfig.from_hf(raw)
    sizes = st.lists(st.integers(0, 200) | st.just(2), max_size=3).map(tuple)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        dtype, shape = tensors.get(name, ("F32", ()))
        tensors.pop(name, None)
        if data.draw(st.booleans()):
            shapes = st.sampled_from([shape, shape[::-1], shape[:1], (*shape, 1)]) | sizes
            dtypes = st.just(dtype) | st.sampled_from(sorted(DTYPES))
            tensors[name] = data.draw(dtypes), data.draw(shapes)
    write_tensors(folder / MODEL, tensors)
    with little_memory(), contextlib.suppress(CheckpointError):
        plain_modules_of(folder, config)
    with little_memory(), contextlib.suppress(CheckpointError):
        check_stored(folder, config, quantised=True, formats=None, with_mtp=True)
    with little_memory(), contextlib.suppress(CheckpointError):
        formats = formats_of(folder, config, raw["quantization_config"], asked=None)
        check_stored(folder, config, quantised=True, formats=formats, with_mtp=True)
