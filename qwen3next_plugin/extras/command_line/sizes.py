"""Bytes of a checkpoint's tensors: by its files, else by its index, else by its config alone."""

import re
from collections import Counter
from collections.abc import Container, Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig, quantization_of
from qwen3next_plugin.model.checkpoint.headers import (
    INDEX,
    Header,
    Index,
    read_header,
    read_index,
    weight_files,
)
from qwen3next_plugin.model.checkpoint.sizes import (
    DTYPES,
    parameters,
    part_of,
    served_bytes,
    shapes_of,
    stays,
    without_mtp,
)
from qwen3next_plugin.model.checkpoint.units import readable

CAST_ON_LOAD = ("BF16", "F16", "F32")  # the engine converts these to the dtype it serves in


def tensor_bytes(
    folder: Path, config: Qwen3NextConfig, dtype: str, asked: str | None
) -> tuple[dict[str, int], str]:
    """Bytes of every tensor but a vision tower's, and where the numbers come from.

    From the safetensors files, in the formats that a CPU serves; else from the index's total (a
    checkpoint that is not downloaded yet); else from the config alone. `asked` is what
    QWEN3NEXT_QUANTISE would say. Respects QWEN3NEXT_HEAD. Raises ConfigError and CheckpointError.
    """
    from qwen3next_plugin.model.checkpoint.layouts import our_name

    index, stored = _headers(folder)
    names = index.files.keys() if index else set()
    sizes = served_bytes(config, DTYPES[dtype], asked=asked)
    if (stored or index) and not any(
        part_of(our_name(name, config) or "") == "MTP" for name in {*names, *stored}
    ):
        sizes = without_mtp(sizes)
    if asked:
        return sizes, f"config.json, quantised to {asked}"
    if stored and names <= stored.keys():
        if quantization := quantization_of(folder):
            return _quantised(folder, config, sizes, quantization, DTYPES[dtype])
        sizes = {
            ours: 0 if stays(ours) else _served_bytes(header, DTYPES[dtype])
            for name, header in stored.items()
            if (ours := our_name(name, config))
        }
        return sizes, "safetensors files"
    if index is None or index.total_size is None:
        return sizes, "config.json"
    return _scaled(sizes, index.total_size, dtype), INDEX


def table_bytes(folder: Path, config: Qwen3NextConfig, dtype: str) -> int:
    """Bytes of the n-gram tables that stay in files: as they are stored, else as the config says.

    Raises: CheckpointError.
    """
    from qwen3next_plugin.model.kinds import kind_of

    if kind_of(config) is None:
        return 0
    index, stored = _headers(folder)
    found = [header for name, header in stored.items() if stays(name)]
    names = index.files if index is not None else stored
    if found and all(name in stored for name in filter(stays, names)):
        return sum(ceil(prod(h.shape) * _bits(h.dtype) / 8) for h in found)
    return sum(n * DTYPES[dtype] for name, n in parameters(config).items() if stays(name))


def _headers(folder: Path) -> tuple[Index | None, dict[str, Header]]:
    """A checkpoint's index, if it has one, and the headers of the files that are there."""
    index, stored = read_index(folder), dict[str, Header]()
    for path in weight_files(folder, index):
        stored |= read_header(path)
    return index, stored


def _quantised(
    folder: Path,
    config: Qwen3NextConfig,
    names: Container[str],
    quantization: Mapping[str, Any],
    itemsize: int,
) -> tuple[dict[str, int], str]:
    """Bytes of the weights of a quantised checkpoint, each in the format that it is served in.

    Raises: CheckpointError for a module that no CPU kernel serves.
    """
    from qwen3next_plugin.model.checkpoint.tensors import HEAD
    from qwen3next_plugin.model.quantisation.at_load import plain_bytes
    from qwen3next_plugin.model.quantisation.files import formats_of

    formats = formats_of(folder, config, quantization, asked=None)
    served = served_bytes(config, itemsize, formats, asked=None).items()
    sizes = {n: b for n, b in served if n in names or n == HEAD}
    totals, in_int8 = Counter[str](), plain_bytes(shapes_of(config))
    for name, nbytes in sizes.items():
        form = formats.format_of(name.removesuffix(".weight"))
        totals[form.encoding if form else "int8" if name in in_int8 else "plain"] += nbytes
    if env.mmap():
        totals = +totals  # without what stays in the files
        totals["mapped"] = formats.nbytes_in_panels
    described = ", ".join(f"{form} {readable(n)}" for form, n in totals.items())
    return sizes, f"safetensors files ({described})"


def _served_bytes(stored: Header, itemsize: int) -> int:
    elements = prod(stored.shape)
    if stored.dtype in CAST_ON_LOAD:
        return elements * itemsize
    return ceil(elements * _bits(stored.dtype) / 8)


def _bits(dtype: str) -> int:
    """Of a value of a dtype, as safetensors names it."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0] if bits else 8)


def _scaled(sizes: dict[str, int], total: float, dtype: str) -> dict[str, int]:
    """The config's sizes, spread over a quantised checkpoint's smaller total."""
    elements = sum(sizes.values()) // DTYPES[dtype]
    if total >= 1.9 * elements:  # 16 or 32 bits a parameter: cast on load
        return sizes
    return {name: ceil(n * total / (elements * DTYPES[dtype])) for name, n in sizes.items()}
