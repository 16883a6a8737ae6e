"""Twelve layers of the released shapes: n-grams before the second, sparse attention in each fourth.

Experts are a quarter of the released ones and the vocabulary is cut as the layers are, so that two
engines fit into 24 GB. Of random weights, with a text that is known and drafts of which four in
five are right, as in chain_model.py. Written once, in three forms:

- `int4`: projections and experts in 4 bits, a small table of n-grams. 7 GB
- `bf16`: the same weights of the first four layers, dequantised, with a layer's experts in one
  tensor: transformers computes no others. 7 GB
- `large`: as `int4`, with a table of 8 GB of zeros: files with holes, whose pages take as much
  memory as others once they are read.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.block_model import (
    LAYER,
    RELEASED,
    finish,
    finished,
    save_whole,
    tensors,
    write_index,
)
from benchmarks.chain_model import EMBEDDING, HEAD, made_vocabulary, passing, write_tokenizer
from benchmarks.full.model import GROUP, KINDS, layer_of
from benchmarks.report import console
from examples.qwen4_exp_tiny import fused, hashes
from qwen3next_plugin.config import read_config
from qwen3next_plugin.model.checkpoint.layouts import SHARD

SIZE, EXPERTS = "Qwen3.8-Flash-Next", 128
LAYERS = {"int4": 12, "bf16": 4, "large": 12}
ROWS = {"int4": 20_000, "bf16": 20_000, "large": 1_562_500}  # of a head's part of the table
TABLE = "table"
FC = "mtp.fc_embedding.weight"


def config_of(form: str) -> dict[str, Any]:
    """The config of a form; `eos_token_id` is the last token, which no answer contains."""
    text = read_config(RELEASED / SIZE)["text_config"]
    vocabulary = text["vocab_size"] * LAYERS["int4"] // text["num_hidden_layers"]
    rope = {k: v for k, v in text["rope_parameters"].items() if not k.startswith("mrope")}
    config = text | {
        "architectures": ["Qwen4ExpForCausalLM"],
        "num_hidden_layers": LAYERS[form],
        "num_experts": EXPERTS,
        "vocab_size": vocabulary,
        "eos_token_id": vocabulary - 1,
        "ngram_vocab_size_base": ROWS[form],
        "rope_parameters": rope,
    }
    return config if form == "bf16" else config | {"quantization_config": KINDS["int4"].config}


def model(folder: Path, form: str) -> Path:
    """Write a form, and the one that it is made of, below `folder` unless it is there."""
    target, config = folder / form, config_of(form)
    if finished(target, config):
        return target
    target.mkdir(parents=True, exist_ok=True)
    source = target if form == "int4" else model(folder, "int4")
    made = _int4(target) if form == "int4" else _derived(target, source, form)
    weight_map: dict[str, str] = {}
    for file, names in made:
        weight_map |= dict.fromkeys(names, file)
    write_index(target, weight_map)
    write_tokenizer(target, config["vocab_size"])
    finish(target, config)
    return target


def table_bytes(form: str) -> int:
    """Bytes of the table of n-grams, in bf16."""
    return sum(
        2 * prod(shape) for name, shape in tensors(config_of(form)).items() if _of(name) == TABLE
    )


def _of(name: str) -> str:
    """The file of a tensor."""
    if SHARD.search(name):
        return TABLE
    if name in (EMBEDDING, HEAD):
        return "vocabulary"
    layer = LAYER.match(name)
    assert layer is not None
    return layer[0] if layer[0] != "model" else "mixer"


def _int4(folder: Path) -> Iterator[tuple[str, list[str]]]:
    config = config_of("int4")
    shapes, by_file = tensors(config), {}
    for name in shapes:
        by_file.setdefault(_of(name), []).append(name)
    parts = track(by_file.items(), "writing a model", console=console)
    for seed, (part, names) in enumerate(parts):
        if part == "vocabulary":
            made = made_vocabulary(config)
        else:
            made = layer_of({name: shapes[name] for name in names}, KINDS["int4"], seed)
        if part == "mtp":
            embedding = load_file(folder / "vocabulary.safetensors")[EMBEDDING][:64]
            made[FC] = passing(embedding).bfloat16()
        if part == TABLE:
            made |= hashes(config)
        save_whole(made, folder / f"{part}.safetensors")
        yield f"{part}.safetensors", list(made)


def _derived(folder: Path, source: Path, form: str) -> Iterator[tuple[str, list[str]]]:
    """The files of another form: linked, or made of the source's."""
    files = {_of(name) for name in tensors(config_of(form))}
    paths = sorted(path for path in source.glob("*.safetensors") if path.stem in files)
    for path in track(paths, f"writing {form}", console=console):
        mine = folder / path.name
        if form == "large" and path.stem == TABLE:
            yield path.name, _write_zeros(mine)
        elif form == "bf16" and path.stem != "mtp":
            made = fused(dequantised(load_file(path)), EXPERTS)
            save_whole(made, mine)
            yield path.name, list(made)
        else:
            mine.unlink(missing_ok=True)
            mine.symlink_to(path.resolve())
            with safe_open(path, framework="pt") as file:
                yield path.name, list(file.keys())


def dequantised(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the checkpoint, those of 4 bits in bf16."""
    found = {}
    for name, tensor in stored.items():
        if name.endswith(".weight_packed"):
            scale = stored[name.replace("_packed", "_scale")].float()
            values = torch.stack([(tensor >> 4 * i & 15) - 8 for i in range(8)], dim=-1).flatten(1)
            weight = values * scale.repeat_interleave(GROUP, dim=1)
            found[name.removesuffix("_packed")] = weight.bfloat16()
        elif not re.search(r"\.weight_(scale|shape)$", name):
            found[name] = tensor
    return found


def _write_zeros(path: Path) -> list[str]:
    """A safetensors file of the large table, whose shards are holes."""
    config = config_of("large")
    shards = {name: shape for name, shape in tensors(config).items() if _of(name) == TABLE}
    header, end = {}, 0
    for name, shape in shards.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return list(shards)
