"""Damage to JSON documents and to the files of a checkpoint, for property tests."""

import copy
import json
import struct
import tracemalloc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

from hypothesis import strategies as st
from torch import uint8

from qwen3next_plugin.model.checkpoint import contents
from qwen3next_plugin.model.checkpoint.headers import read_places

MOST_MEMORY = 100e6  # bytes that reading a damaged file may take
REMOVED = object()
VALUES = st.one_of(
    st.sampled_from([None, REMOVED, 10**6, 10**12, 2**63, 10**400, [], {}, [[]], ["a"], [None]]),
    st.sampled_from([{"a": 1}, {"rope_type": "yarn", "factor": 1e300}, "linear_attention"]),
    st.booleans(),
    st.integers(-2, 5),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-1, 3), max_size=3),
)
Place = tuple[str | int, ...]
SLIGHT = {  # what is wrong with a checkpoint, and the tensor that has it
    "norm": "model.layers.1.input_layernorm.weight",
    "router": "model.layers.2.mlp.gate.weight",
    "sign": "model.layers.3.self_attn.q_proj.weight",
}


def places(document: Any, above: Place = ()) -> Iterator[Place]:
    """Where a document has its values, at any depth."""
    if isinstance(document, dict):
        inside = list(document.items())
    else:
        inside = list(enumerate(document)) if isinstance(document, list) else []
    for key, value in inside:
        yield (*above, key)
        yield from places(value, (*above, key))


def damaged(document: Any, *, most: int = 3) -> st.SearchStrategy[Any]:
    """The document with some of its values replaced or removed; or another value."""
    change = st.tuples(st.sampled_from(list(places(document))), VALUES)
    changes = st.lists(change, min_size=1, max_size=most)
    return changes.map(lambda chosen: _changed(document, chosen)) | VALUES.filter(
        lambda value: value is not REMOVED
    )


def _changed(document: Any, changes: Sequence[tuple[Place, Any]]) -> Any:
    document = copy.deepcopy(document)
    for (*path, last), value in changes:
        owner = document
        try:
            for key in path:
                owner = owner[key]
            if value is REMOVED:
                del owner[last]
            else:
                owner[last] = copy.deepcopy(value)
        except (IndexError, KeyError, TypeError):
            continue  # an earlier change has replaced what held it
    return document


def header_of(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and the number of bytes behind it."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), len(data) - 8 - length


def write_file(path: Path, header: Any, size: int, *, length: int | None = None) -> None:
    """A safetensors file with this header, JSON or bytes, and zeros behind it."""
    data = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(data) if length is None else length) + data)
        file.truncate(8 + len(data) + size)


def slightly_changed(folder: Path, out: Path, what: str) -> Path:
    """A copy of a checkpoint whose one tensor differs: all of a norm, two experts, or one sign."""
    copytree(folder, out, copy_function=copyfile)
    for path in out.glob("*.safetensors"):
        if place := read_places(path)[1].get(SLIGHT[what]):
            tensor = contents.read(place)
            if what == "norm":
                tensor *= 1.01
            elif what == "router":
                tensor[:2] = tensor[:2].flip(0)
            else:
                tensor.view(-1)[tensor.numel() // 3] *= -1
            with path.open("r+b") as file:
                file.seek(place.offset)
                file.write(tensor.flatten().view(uint8).numpy().tobytes())
            return out
    raise AssertionError(SLIGHT[what])


@contextmanager
def little_memory() -> Iterator[None]:
    """Fail if what is done inside takes much memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
