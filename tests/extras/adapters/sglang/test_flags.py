"""Adapters that flags name are checked before a worker starts."""

import os
import re
from unittest import mock

import pytest
import torch

from checkpoints import BASE
from engines.lora import write_adapter
from qwen3next_plugin.config import ConfigError


@pytest.fixture
def complete():
    """SGLang completes its flags; it hands some of them on in environment variables."""
    with mock.patch.dict(os.environ):
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.server_args import ServerArgs

        yield lambda model, **flags: ServerArgs(model_path=str(model), **flags).resolve_once()


def test_adapters_are_checked_by_their_files(complete, checkpoint, tmp_path):
    """As a path, by a name, and as SGLang's Python has them."""
    expert = "base_model.model.model.layers.0.mlp.experts.1.up_proj"
    a, b = torch.ones(4, BASE["hidden_size"]), torch.ones(BASE["moe_intermediate_size"], 4)
    tensors = {f"{expert}.lora_A.weight": a, f"{expert}.lora_B.weight": b}
    folder = str(write_adapter(tmp_path / "adapter", tensors, ["up_proj"]))
    named = {"lora_name": "x", "lora_path": folder}
    for paths in ([folder], [f"x={folder}"], [named], {"x": folder}):
        message = f"--lora-paths {folder}: tensor {expert}.lora_A.weight: no adapter is served"
        with pytest.raises(ConfigError, match=re.escape(message)):
            complete(checkpoint, lora_paths=paths)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safe_serialization=True"):
        complete(checkpoint, lora_paths=[folder])
    with pytest.raises(ConfigError, match=r"adapter_config\.json is not there"):
        complete(checkpoint, lora_paths=[str(tmp_path)])
