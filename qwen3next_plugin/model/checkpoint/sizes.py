"""Bytes of a checkpoint's weights, by part and on one tensor-parallel rank."""

import re
from collections import Counter
from collections.abc import Container, Mapping
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from qwen3next_plugin.model.checkpoint.units import readable

if TYPE_CHECKING:
    from qwen3next_plugin.model.checkpoint.layouts import Shapes
    from qwen3next_plugin.model.quantisation.modules import Formats

PARTS = (
    *("embeddings and norms", "linear attention", "attention", "experts and MLPs", "MTP"),
    *("streams and n-grams", "n-gram table"),
)
SHARD_MARK = ".ngram_embedding.shard_"
PART_OF_MARK = {  # what is in a tensor's name → its part; the first one counts
    ".linear_attn.": "linear attention",
    ".self_attn.": "attention",
    ".mlp.": "experts and MLPs",
    SHARD_MARK: "n-gram table",
    ".ple.": "streams and n-grams",
    "hyper_connection": "streams and n-grams",
}
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
CAST_ON_LOAD = ("BF16", "F16", "F32")  # the engine converts these to the dtype it serves in

# Not sharded: norms, the router, the shared expert's gate.
REPLICATED = (
    *("norm", ".mlp.gate.", ".shared_expert_gate.", ".o_proj.bias"),
    *("hyper_connection", ".ple.", ".indexer."),
)
# With more ranks than key-value heads, ranks hold copies of these.
KEY_VALUE = ("k_proj.", "v_proj.")


@cache  # of a large model, 100,000 names are asked for several times
def part_of(name: str) -> str:
    """Which of PARTS a tensor of the checkpoint belongs to."""
    if name.startswith("mtp."):
        return "MTP"
    found = (part for mark, part in PART_OF_MARK.items() if mark in name)
    return next(found, "embeddings and norms")


def without_mtp(sizes: Mapping[str, int]) -> dict[str, int]:
    """The sizes of the trunk's tensors."""
    return {name: nbytes for name, nbytes in sizes.items() if part_of(name) != "MTP"}


def rank_bytes(sizes: Mapping[str, int], config: Qwen3NextConfig) -> dict[str, int]:
    """Bytes of each part on one rank, from the bytes of each tensor."""
    parts = dict.fromkeys(PARTS, 0)
    for name, nbytes in sizes.items():
        parts[part_of(name)] += ceil(nbytes / _ranks_sharing(name, config))
    return parts


def _ranks_sharing(name: str, config: Qwen3NextConfig) -> int:
    if config.tp_size == 1 or any(mark in name for mark in REPLICATED):
        return 1
    if any(mark in name for mark in KEY_VALUE):
        return min(config.tp_size, config.num_key_value_heads)
    return config.tp_size


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
            ours: 0 if _stays(ours) else _served_bytes(header, DTYPES[dtype])
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
    if not config.ple_layer_ids:
        return 0
    index, stored = _headers(folder)
    found = [header for name, header in stored.items() if _stays(name)]
    names = index.files if index is not None else stored
    if found and all(name in stored for name in filter(_stays, names)):
        return sum(ceil(prod(h.shape) * _bits(h.dtype) / 8) for h in found)
    return sum(n * DTYPES[dtype] for name, n in parameters(config).items() if _stays(name))


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
    totals, in_int8 = Counter[str](), plain_bytes(_shapes(config))
    for name, nbytes in sizes.items():
        form = formats.format_of(name.removesuffix(".weight"))
        totals[form.encoding if form else "int8" if name in in_int8 else "plain"] += nbytes
    if env.mmap():
        totals = +totals  # without what stays in the files
        totals["mapped"] = formats.nbytes_in_panels
    described = ", ".join(f"{form} {readable(n)}" for form, n in totals.items())
    return sizes, f"safetensors files ({described})"


def served_bytes(
    config: Qwen3NextConfig,
    itemsize: int,
    formats: "Formats | None" = None,
    *,
    asked: str | None,
) -> dict[str, int]:
    """Bytes of every weight in its format, or quantised at load as asked; without one, plain.

    Weights that stay in mapped files need no memory.
    """
    from qwen3next_plugin.model.quantisation.at_load import plain_bytes, quantised_bytes
    from qwen3next_plugin.model.quantisation.format import InPanels

    shapes, sizes = _shapes(config), {}
    for name, shape in shapes.items():
        form = formats.format_of(name.removesuffix(".weight")) if formats else None
        sizes[name] = form.nbytes(*shape) if form else prod(shape) * itemsize
        if (isinstance(form, InPanels) and env.mmap()) or _stays(name):
            sizes[name] = 0
    if formats:
        sizes |= plain_bytes(shapes)
    if formats and env.mmap():
        sizes |= {f"{name}.weight": 0 for name in formats.packed_plain}
    if asked:
        sizes |= quantised_bytes(asked, shapes)
    return sizes


def _stays(name: str) -> bool:
    """Whether a tensor stays in its file, whose pages Linux keeps or drops."""
    return SHARD_MARK in name and env.ngram() == "mapped"


def parameters(config: Qwen3NextConfig) -> dict[str, int]:
    """Number of parameters of every tensor of the model."""
    return {name: prod(shape) for name, shape in _shapes(config).items()}


def _shapes(config: Qwen3NextConfig) -> "Shapes":
    from qwen3next_plugin.model.checkpoint.tensors import all_tensors

    return all_tensors(config)


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
