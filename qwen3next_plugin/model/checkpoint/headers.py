"""Reads a checkpoint's index and the headers of its safetensors files."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from qwen3next_plugin.config.errors import SHOWN, is_number, shown
from qwen3next_plugin.config.json_files import read_object
from qwen3next_plugin.model.checkpoint.errors import CheckpointError

INDEX = "model.safetensors.index.json"
MOST_DIMS, MOST_ELEMENTS = 8, 2**63 - 1  # that torch has sizes for


class Header(NamedTuple):
    """The header entry of one tensor in a file."""

    dtype: str  # by its name in safetensors files
    shape: tuple[int, ...]


class Place(NamedTuple):
    """Where a tensor is in a file."""

    path: Path
    offset: int
    header: Header


class Index(NamedTuple):
    """The index of a checkpoint in several files."""

    files: Mapping[str, str]  # tensor → the file that has it
    total_size: float | None  # of all tensors, in bytes; tools may leave it out


def read_index(folder: Path) -> Index | None:
    """A folder's index, if it has one.

    Raises:
        CheckpointError: names what is wrong with it.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    raw = read_object(path, CheckpointError)
    files, metadata = raw.get("weight_map"), raw.get("metadata") or {}
    if not isinstance(files, dict) or not files:
        raise _damaged(path, "weight_map", files, "must name the file of each tensor")
    for tensor, file in files.items():
        if not isinstance(file, str) or "/" in file or file in ("", ".", ".."):
            fix = "must be a file of the same folder"
            raise _damaged(path, f"weight_map: {shown(tensor)}", file, fix)
    if not isinstance(metadata, dict):
        raise _damaged(path, "metadata", metadata, "must be an object, or absent")
    total = metadata.get("total_size")
    if total is not None and (not is_number(total) or total <= 0):
        raise _damaged(path, "metadata.total_size", total, "must be positive, or absent")
    return Index(files, total)


def weight_files(folder: Path, index: Index | None) -> list[Path]:
    """A checkpoint's safetensors files: those of the index, if there is one.

    Other files may hold the same tensors again, under other names.
    """
    files = sorted(folder.glob("*.safetensors"))
    if index is None:
        return files
    listed = set(index.files.values())
    return [path for path in files if path.name in listed]


@contextmanager
def opened(path: Path, framework: str, error: type[ValueError] = CheckpointError) -> Iterator[Any]:
    """Open a safetensors file with `safe_open`, which checks its header and its length.

    It checks the header's length before it reads the header, the types of all entries, and that
    the tensors cover the data without gaps. It reads no tensors.

    Raises:
        error: names the file and what is wrong.
    """
    again = "it is truncated or damaged, download it again"
    if not path.is_file():
        raise error(f"{path} is not there, or no file; download it again")
    try:
        file = safe_open(path, framework=framework)
    except SafetensorError as reason:
        said = str(reason).removeprefix("Error while deserializing header: ")[:SHOWN]
        raise error(
            f"{path.name} has {path.stat().st_size} bytes and its header cannot be used ({said}): "
            f"{again}"
        ) from reason
    except PermissionError as reason:
        raise error(f"{path}: this user may not read it; change its owner or mode") from reason
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason}): {again}") from reason
    with file:
        yield file


def read_header(path: Path, error: type[ValueError] = CheckpointError) -> dict[str, Header]:
    """The tensors of a safetensors file, by name; raises as `opened`."""
    found: dict[str, Header] = {}
    with opened(path, "numpy", error) as file:
        for name in file.keys():  # noqa: SIM118 (it iterates no other way)
            tensor = file.get_slice(name)
            shape = tuple(tensor.get_shape())
            if len(shape) > MOST_DIMS or math.prod(max(1, n) for n in shape) > MOST_ELEMENTS:
                raise error(
                    f"{path.name}: tensor {name} has shape {shown(shape)}, which no tensor can "
                    f"have; the file is damaged, download it again"
                )
            found[name] = Header(tensor.get_dtype(), shape)
    return found


def read_places(path: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """A safetensors file's metadata, and where its tensors are; raises as `opened`."""
    headers = read_header(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(size))
    metadata = entries.pop("__metadata__", None) or {}
    return metadata, {
        name: Place(path, 8 + size + entry["data_offsets"][0], headers[name])
        for name, entry in entries.items()
    }


def check_files(folder: Path) -> None:
    """Refuse a folder with a damaged index, or a safetensors file that is damaged or cut short.

    Raises:
        CheckpointError: names the file and what is wrong.
    """
    for path in weight_files(folder, read_index(folder)):
        with opened(path, "numpy"):
            pass


def _damaged(path: Path, name: str, found: object, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {name} = {shown(found)}: {what}; fetch the file again")
