"""Random LoRA adapters, in PEFT's layout."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from reference import Reference

RANK, ALPHA = 4, 8
TARGETS = (
    *("in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
    *("out_proj", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)


def make_adapter(
    folder: Path,
    reference: Reference,
    prefixes: Sequence[str] = ("model.",),
    *,
    rank: int = RANK,
    targets: Sequence[str] = TARGETS,
    rslora: bool = False,
) -> Path:
    """Write an adapter of every projection of `targets`, and merge it into `reference`.

    `prefixes`: how names of modules begin, one after the other; `rslora`: scaled by √rank.
    """
    generator = torch.Generator().manual_seed(rank)
    tensors, names = {}, set()
    for name, module in reference.trunk.named_modules():
        kind = name.rpartition(".")[2]
        if kind not in targets or not isinstance(module, nn.Linear):
            continue
        rows, columns = module.weight.shape
        a = torch.randn(rank, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, rank, generator=generator) * 0.2
        prefix = prefixes[len(tensors) // 2 % len(prefixes)]
        stem = "base_model.model." + prefix + name.removeprefix("model.")
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = b
        module.weight.data += ALPHA / (rank**0.5 if rslora else rank) * b @ a
        names.add(kind)
    return write_adapter(folder, tensors, sorted(names), rank=rank, use_rslora=rslora)


def write_adapter(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    names: list[str],
    *,
    rank: int = RANK,
    **settings: Any,
) -> Path:
    """Write these tensors as an adapter of modules with these names; returns the folder."""
    folder.mkdir()
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": names}
    config |= settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
