"""What a checkpoint's quantised weights are loaded as."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.layouts import SHARD, holder
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.quantisation.format import CHANNEL_SCALE, Format, dequantise
from qwen3next_plugin.model.quantisation.modules import Formats


def load(folder: Path, asked: str | None = None, **changes):
    """The formats of a checkpoint, its config.json changed, and the tensors of our parameters."""
    raw = json.loads((folder / "config.json").read_text()) | changes
    config = Qwen3NextConfig.from_hf(raw)
    shapes = all_tensors(config)
    formats = formats_of(folder, config, raw.get("quantization_config"), asked=asked)
    stored = load_file(folder / "model.safetensors")
    return formats, dict(parameters(stored.items(), config, expected=shapes, formats=formats))


def check(quantised: Path, twin: Path) -> None:
    """What is loaded says exactly what the twin's weights are."""
    formats, found = load(quantised)
    raw = json.loads((twin / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    shapes = all_tensors(config)
    stored = load_file(twin / "model.safetensors")
    for name, weight in parameters(stored.items(), config, expected=shapes):
        module = name.removesuffix(".weight")
        if SHARD.search(name):  # a table, which is read apart
            continue
        if f"{module}.weight_scale" in found:
            tensors = {
                part: found[f"{module}.{part}"]
                for part in ("weight", "weight_scale", "weight_zero", CHANNEL_SCALE)
                if f"{module}.{part}" in found
            }
            got = dequantise(tensors, form_of(formats, module, config))
        else:
            got = found[name]
        torch.testing.assert_close(got, weight.float(), rtol=1e-6, atol=1e-7, msg=name)


def form_of(formats: Formats, module: str, config: Qwen3NextConfig) -> Format:
    """The format of a tensor of ours."""
    found = formats.of(holder(module, config))
    assert found is not None, module
    return found["w2" if "down_proj" in module else "w13"] if len(found) > 1 else found["weight"]
