"""Convert the training model to the released checkpoint's layout, and back."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from .architecture import FULL_ATTENTION_INTERVAL, TinyQwen3Next, tiny_config

WEIGHTS = "model.safetensors"


def released_tensors(model: TinyQwen3Next) -> dict[str, Tensor]:
    """The checkpoint in bf16, with names and shapes as in Qwen3-Next-80B-A3B."""
    named = dict(model.trunk.state_dict())
    named |= {f"mtp.{name}": tensor for name, tensor in model.mtp.state_dict().items()}
    return {
        name: tensor.to(torch.bfloat16).contiguous()
        for fused, value in named.items()
        for name, tensor in split_experts(fused, value)
    }


def split_experts(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One tensor per expert and projection; other tensors unchanged."""
    prefix, found, kind = name.rpartition("mlp.experts.")
    if not found:
        yield name, value
        return
    for e, expert in enumerate(value):
        path = f"{prefix}mlp.experts.{e}"
        if kind == "down_proj":
            yield f"{path}.down_proj.weight", expert
        else:
            gate, up = expert.chunk(2)  # [2I, D] → [I, D] twice
            yield f"{path}.gate_proj.weight", gate
            yield f"{path}.up_proj.weight", up


def fused_mtp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's `mtp.*` tensors as the MTP module names them, with experts fused."""
    mtp = {n.removeprefix("mtp."): t for n, t in tensors.items() if n.startswith("mtp.")}
    experts = "layers.0.mlp.experts."
    out = {n: t for n, t in mtp.items() if not n.startswith(experts)}
    count = sum(n.startswith(experts) and n.endswith("down_proj.weight") for n in mtp)

    def stack(kind: str) -> Tensor:
        return torch.stack([mtp[f"{experts}{e}.{kind}.weight"] for e in range(count)])

    out[f"{experts}gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    out[f"{experts}down_proj"] = stack("down_proj")
    return out


def export(model: TinyQwen3Next, out: Path) -> None:
    """Write weights and configs; the weights replace an older snapshot atomically."""
    partial = out / f".{WEIGHTS}.partial"
    save_file(released_tensors(model), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, out / WEIGHTS)
    config = model.config.to_dict() | {"full_attention_interval": FULL_ATTENTION_INTERVAL}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    generation = {
        "bos_token_id": model.config.bos_token_id,
        "eos_token_id": [model.config.eos_token_id, model.config.pad_token_id],
        "pad_token_id": model.config.pad_token_id,
        "do_sample": False,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def load(folder: Path) -> TinyQwen3Next:
    """Load the checkpoint in fp32; every tensor must match. transformers loads the trunk."""
    model = TinyQwen3Next(tiny_config())
    trunk = type(model.trunk).from_pretrained(folder, dtype=torch.float32)
    model.trunk.load_state_dict(trunk.state_dict())
    mtp = {n: t.float() for n, t in fused_mtp(load_file(folder / WEIGHTS)).items()}
    model.mtp.load_state_dict(mtp)
    return model.eval()
