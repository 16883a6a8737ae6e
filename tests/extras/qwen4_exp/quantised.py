"""Quantised checkpoints of Qwen4-Exp, their tables in FP8, and what both say in fp32."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints import random_prompt
from examples.qwen4_exp_tiny import fused, hashes, write
from quantised import pack_checkpoint, quantise
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.extras.qwen4_exp.tensors import TABLE_SCALE
from qwen3next_plugin.model.checkpoint.layouts import SHARD, our_names

# With seed 31 a token's experts or blocks are within rounding of others, in NVFP4 under vLLM.
PROMPTS = [random_prompt(length, seed=32) for length in (1, 3, 64, 65, 300)]
# Sizes of which a scale's blocks, groups and words are divisors, or not.
SIZES: dict[str, Any] = {
    "hidden_size": 160,
    "ple_embed_dim": 320,
    "moe_intermediate_size": 64,
    "linear_num_value_heads": 8,
}
IN_PANELS = "in panels"
LARGEST = 448.0
WEIGHTS = "model.safetensors"


def write_split(folder: Path, **changes: Any) -> Path:
    """The checkpoint with tensors of each expert, as quantised releases have them."""
    write(folder, **SIZES | changes)
    config = Qwen3NextConfig.from_hf(read_config(folder))
    tensors = our_names(load_file(folder / WEIGHTS).items(), config)
    save_file({name: tensor.clone() for name, tensor in tensors}, folder / WEIGHTS)
    return folder


def write_kind(plain: Path, folder: Path, kind: str) -> tuple[Path, dict[str, str], Path]:
    """`quantised.quantise`, with the table in FP8 if the kind is a file's; the twin is fused.

    IN_PANELS: one of KINDS, packed as `qwen3next pack` does, and mapped.
    """
    if kind == IN_PANELS:
        served, env, twin = write_kind(plain, folder, "packed_4-bit")
        return pack_checkpoint(served, folder / "out"), env | {"QWEN3NEXT_MMAP": "1"}, twin
    served, env, twin = quantise(plain, folder, kind)
    if served != plain:
        table_in_fp8(served, twin)
    tensors, raw = load_file(twin / WEIGHTS), read_config(twin)
    save_file(fused(tensors, raw["num_experts"]) | hashes(raw), twin / WEIGHTS)
    return served, env, twin


def table_in_fp8(folder: Path, twin: Path) -> None:
    """Round a checkpoint's tables to FP8, each with one scale in bf16; and the twin's likewise."""
    stored, plainly = load_file(folder / WEIGHTS), load_file(twin / WEIGHTS)
    for stem in sorted({re.sub(r"shard_\d+\.weight$", "", n) for n in stored if SHARD.search(n)}):
        shards = [name for name in stored if name.startswith(stem)]
        largest = max(float(stored[name].abs().max()) for name in shards)
        scale = torch.tensor([largest / LARGEST]).bfloat16()
        for name in shards:
            values = (stored[name] / scale.float()).clamp(-LARGEST, LARGEST)
            stored[name] = values.to(torch.float8_e4m3fn)
            plainly[name] = stored[name].float() * scale.float()
        stored[stem.removesuffix("ngram_embedding.") + TABLE_SCALE] = scale
    save_file(stored, folder / WEIGHTS)
    save_file(plainly, twin / WEIGHTS)
