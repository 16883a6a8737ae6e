"""Bytes of a checkpoint's weights, by part and on one tensor-parallel rank."""

from collections.abc import Mapping
from functools import cache
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig

if TYPE_CHECKING:
    from qwen3next_plugin.model.checkpoint.layouts import Shapes
    from qwen3next_plugin.model.quantisation.modules import Formats

PARTS = (
    *("embeddings and norms", "linear attention", "attention", "experts and MLPs", "MTP"),
    *("streams and n-grams", "n-gram table"),
)
SHARD_MARK = ".ngram_embedding.shard_"
PART_OF_MARK = {  # substring of a tensor's name → its part; the first match counts
    ".linear_attn.": "linear attention",
    ".self_attn.": "attention",
    ".mlp.": "experts and MLPs",
    SHARD_MARK: "n-gram table",
    ".ple.": "streams and n-grams",
    "hyper_connection": "streams and n-grams",
}
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}

# Not sharded: norms, the router, the shared expert's gate.
REPLICATED = (
    *("norm", ".mlp.gate.", ".shared_expert_gate.", ".o_proj.bias"),
    *("hyper_connection", ".ple.", ".indexer."),
)
# With more ranks than key-value heads, ranks hold copies of these.
KEY_VALUE = ("k_proj.", "v_proj.")


@cache  # a large model looks up 100,000 names several times
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


def served_dtype(raw: Mapping[str, Any]) -> str:
    """The dtype that a config says the checkpoint is served in."""
    text = raw.get("text_config") or {}
    named = (level.get(key) for level in (text, raw) for key in ("dtype", "torch_dtype"))
    dtype = str(next(filter(None, named), "bfloat16"))
    if dtype not in DTYPES:
        raise ConfigError(f"dtype = {dtype!r}: give --dtype {', '.join(DTYPES)}")
    return dtype


def served_bytes(
    config: Qwen3NextConfig,
    itemsize: int,
    formats: "Formats | None" = None,
    *,
    asked: str | None,
) -> dict[str, int]:
    """Bytes of every weight: in its format, quantised at load if asked, or else plain.

    Weights that stay in mapped files need no memory.
    """
    from qwen3next_plugin.model.quantisation.at_load import plain_bytes, quantised_bytes
    from qwen3next_plugin.model.quantisation.format import InPanels

    shapes, sizes = shapes_of(config), {}
    for name, shape in shapes.items():
        form = formats.format_of(name.removesuffix(".weight")) if formats else None
        sizes[name] = form.nbytes(*shape) if form else prod(shape) * itemsize
        if (isinstance(form, InPanels) and env.mmap()) or stays(name):
            sizes[name] = 0
    if formats:
        sizes |= plain_bytes(shapes)
    if formats and env.mmap():
        sizes |= {f"{name}.weight": 0 for name in formats.packed_plain}
    if asked:
        sizes |= quantised_bytes(asked, shapes)
    return sizes


def stays(name: str) -> bool:
    """Whether a tensor stays in its file, whose pages Linux keeps or drops."""
    return SHARD_MARK in name and env.ngram() == "mapped"


def parameters(config: Qwen3NextConfig) -> dict[str, int]:
    """Number of parameters of every tensor of the model."""
    return {name: prod(shape) for name, shape in shapes_of(config).items()}


def shapes_of(config: Qwen3NextConfig) -> "Shapes":
    """The shape of every tensor of the model."""
    from qwen3next_plugin.model.checkpoint.tensors import all_tensors

    return all_tensors(config)
