"""What a packed checkpoint is loaded as, and how an engine checks it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from quantised import int8_by_row
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.linear import PackedWeight, unpack
from qwen3next_plugin.model.checkpoint.reading import check_stored, parameters
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
from qwen3next_plugin.model.quantisation.files import formats_of
from qwen3next_plugin.model.quantisation.in_panels import FormatsInPanels
from qwen3next_plugin.model.quantisation.stacked import stacked_weights


def opened(folder: Path) -> tuple[Qwen3NextConfig, FormatsInPanels]:
    raw = json.loads((folder / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    found = formats_of(folder, config, raw["quantization_config"], asked=None)
    assert isinstance(found, FormatsInPanels)
    return config, found


def check_packed(folder: Path) -> None:
    """As an engine does before it loads."""
    config, formats = opened(folder)
    check_stored(folder, config, quantised=True, formats=formats, with_mtp=True)


def stored(folder: Path) -> dict[str, Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def load(folder: Path) -> tuple[dict[str, PackedWeight], dict[str, Tensor]]:
    """The packed weights and all other tensors of our parameters."""
    config, formats = opened(folder)
    weights: dict[str, PackedWeight] = {}
    others = parameters(
        stored(folder).items(),
        config,
        expected=all_tensors(config),
        formats=formats,
        attach=weights.__setitem__,
    )
    return weights, dict(others)


def check(folder: Path, twin: Path, *, rounded: bool = False) -> None:
    """What is loaded says what the twin's weights are; `rounded`: what may be is int8 besides."""
    weights, others = load(folder)
    config = Qwen3NextConfig.from_hf(json.loads((twin / "config.json").read_text()))
    expected = dict(parameters(stored(twin).items(), config, expected=all_tensors(config)))
    for name, whole in stacked_weights(config).items():
        if name not in weights:
            continue
        modules = (name,) if f"{name}.weight" in expected else whole.modules
        rows = torch.cat([expected[f"{module}.weight"].float() for module in modules])
        wanted = rows.view(whole.shape)
        if rounded and weights[name].encoding == "int8":
            wanted = int8_by_row(rows)[1].view(whole.shape)
        torch.testing.assert_close(unpack(weights[name]), wanted, rtol=1e-6, atol=1e-7, msg=name)
        for module in modules:
            if module != "model.embed_tokens":
                del expected[f"{module}.weight"]
    assert others.keys() == expected.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7, msg=name)
