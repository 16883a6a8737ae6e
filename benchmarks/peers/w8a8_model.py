"""The block model as compressed-tensors' `int-quantized`, which zentorch's kernels take (W8A8)."""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file

from benchmarks.peers.gguf_model import files
from benchmarks.report import console

# What the plugin leaves in bf16, too.
LEFT = r"norm|conv1d|in_proj_ba|mlp\.gate\.|shared_expert_gate"
QUANTISED = re.compile(rf"model\.layers\.(?!.*(?:{LEFT})).*\.weight")
CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": [
        "lm_head",
        r"re:.*in_proj_ba$",
        r"re:.*mlp\.gate$",
        r"re:.*shared_expert_gate$",
    ],
}


def w8a8_model(checkpoint: Path, folder: Path) -> Path:
    """Write a checkpoint's trunk with int8 weights into `folder` unless it is there."""
    done = folder / "config.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    saved: dict[str, torch.Tensor] = {}
    with ExitStack() as stack:
        for name, file in track(files(checkpoint, stack).items(), "writing W8A8", console=console):
            if name.startswith("mtp."):
                continue
            tensor = file.get_tensor(name)
            if QUANTISED.fullmatch(name):
                scale = tensor.float().abs().amax(dim=1, keepdim=True) / 127
                saved[f"{name}_scale"] = scale
                tensor = (tensor.float() / scale).round().to(torch.int8)
            saved[name] = tensor
        save_file(saved, folder / "model.safetensors")
    config = json.loads((checkpoint / "config.json").read_text())
    done.write_text(json.dumps(config | {"quantization_config": CONFIG}, indent=2))
    return folder
