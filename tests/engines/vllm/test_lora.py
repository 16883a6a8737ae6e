"""LoRA on the projections: an adapter on the server equals its weights merged in transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import random_prompt
from engines.checks import check_greedy
from engines.vllm.offline import Offline
from reference import Reference

RANK, ALPHA = 4, 8
TARGETS = {
    "linear_attn": ("in_proj_qkvz", "in_proj_ba", "out_proj"),
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
}

pytestmark = pytest.mark.serve


def make_adapter(folder: Path, reference: Reference) -> Path:
    """Write a random adapter of every projection in PEFT's layout; merge it into `reference`."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, module in reference.trunk.named_modules():
        mixer, _, projection = name.rpartition(".")
        if projection not in TARGETS.get(mixer.rpartition(".")[2], ()):
            continue
        rows, columns = module.weight.shape
        a = torch.randn(RANK, columns, generator=generator) / columns**0.5
        b = torch.randn(rows, RANK, generator=generator) * 0.3
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
        module.weight.data += ALPHA / RANK * b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    names = [name for projections in TARGETS.values() for name in projections]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_adapter_equals_merged_weights(checkpoint: Path, tmp_path: Path) -> None:
    """Prompt log-probabilities with the adapter are the merged model's; without it, the base's."""
    plain, merged = Reference(checkpoint), Reference(checkpoint)
    adapter = make_adapter(tmp_path / "adapter", merged)
    prompts = [random_prompt(3), random_prompt(65)]
    engine = Offline(checkpoint, dtype="float32", enable_lora=True, max_model_len=512)
    try:
        for reference, params in ((merged, {"adapter": str(adapter)}), (plain, {})):
            outputs = engine.greedy(prompts, 8, logprobs=0, prompt_logprobs=0, **params)
            check_greedy(reference, prompts, outputs)
    finally:
        engine.close()
