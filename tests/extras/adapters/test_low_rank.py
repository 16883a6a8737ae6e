"""LoRA adapters in PEFT's names: what they add to our projections, and what is refused."""

import json

import pytest
import torch

from checkpoints import BASE, random_tensors
from damage import write_file
from model.test_layouts import FLAT, flattened
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.extras.adapters.low_rank import PROJECTIONS, AdapterError, check_stored, read
from qwen3next_plugin.model.checkpoint.layouts import STACKED_PROJECTIONS
from qwen3next_plugin.model.checkpoint.reading import parameters
from qwen3next_plugin.model.checkpoint.tensors import trunk_tensors

STEM = "base_model.model."
LAYER = "model.layers.0.linear_attn"


def adapter(shapes, rank=3, prefix="model."):
    """Of every second projection, so that some parts of a stacked one have none."""
    modules = sorted(
        name.removesuffix(".weight")
        for name in shapes
        if name.split(".")[-2] in PROJECTIONS and ".experts." not in name
    )[::2]
    tensors = {}
    for i, module in enumerate(modules):
        (N, K), r = shapes[f"{module}.weight"], rank + i % 2
        name = STEM + prefix + module.removeprefix("model.")
        tensors[f"{name}.lora_A.weight"] = torch.randn(r, K)
        tensors[f"{name}.lora_B.weight"] = torch.randn(N, r)
    return modules, tensors


def ours(tensors, config):
    """Our projections: of the checkpoint's, converted and stacked."""
    found = dict(parameters(tensors.items(), config, expected=trunk_tensors(config)))
    wholes = {}
    for part, (whole, _) in STACKED_PROJECTIONS.items():
        for name in [name for name in found if f"{part}." in name]:
            wholes.setdefault(name.replace(part, whole), []).append(found.pop(name))
    return found | {name: torch.cat(parts) for name, parts in wholes.items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("raw", "prefix"),
    [(BASE, "model."), (FLAT, "model."), (FLAT, "model.language_model.")],
    ids=["grouped", "flat", "flat-wrapped"],
)
def test_it_adds_what_merging_adds(raw, prefix, rslora):
    torch.manual_seed(0)
    config = Qwen3NextConfig.from_hf(raw)
    base = {n: t.double() for n, t in random_tensors(BASE, mtp=False).items()}
    if raw is FLAT:
        base = flattened(base, config, fused=False, prefix="model.")
    modules, tensors = adapter({name: tensor.shape for name, tensor in base.items()}, prefix=prefix)
    merged = dict(base)
    for i, module in enumerate(modules):
        name = STEM + prefix + module.removeprefix("model.")
        scale = 8 / ((3 + i % 2) ** 0.5 if rslora else 3 + i % 2)
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        merged[f"{module}.weight"] = base[f"{module}.weight"] + scale * (b @ a)
    settings = {"r": 3, "lora_alpha": 8, "use_rslora": rslora, "alpha_pattern": {}}
    found = read(tensors.items(), settings, config)
    before, after = ours(base, config), ours(merged, config)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {f"{name}.weight" for name in found} == changed
    for name, low_rank in found.items():
        difference = after[f"{name}.weight"] - before[f"{name}.weight"]
        torch.testing.assert_close(
            (low_rank.b @ low_rank.a).double(), difference, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{LAYER}.in_proj_qkvz.lora_A.weight", (3, 64), "no adapter is served there"),
        ("model.layers.0.mlp.experts.3.up_proj.lora_A.weight", (3, 64), "no adapter is served"),
        ("model.layers.0.mlp.experts.lora_A.weight", (24, 64), "no adapter is served there"),
        ("model.layers.0.mlp.gate.lora_A.weight", (3, 64), "no adapter is served there"),
        ("model.layers.9.self_attn.q_proj.lora_A.weight", (3, 64), "no adapter is served there"),
        ("model.visual.blocks.0.attn.qkv.lora_A.weight", (3, 64), "no adapter is served there"),
        ("mtp.layers.0.self_attn.q_proj.lora_A.weight", (3, 64), "no adapter is served there"),
        ("lm_head.lora_A.weight", (3, 64), "no adapter is served there"),
        ("lm_head.weight", (512, 64), "no adapter is served there"),
        (f"{LAYER}.in_proj_z.lora_magnitude_vector", (64,), "no adapter is served there"),
        (f"{LAYER}.in_proj_z.lora_B.weight", (65, 3), r"\(65, 3\), and the model's weight is"),
        (f"{LAYER}.in_proj_z.lora_A.weight", (5, 64), "belong together"),
        (f"{LAYER}.in_proj_b.lora_A.weight", (3, 64), "belong together"),
    ],
)
def test_what_would_be_left_out_is_refused(name, shape, message):
    config = Qwen3NextConfig.from_hf(FLAT)
    N, K = trunk_tensors(config)[f"{LAYER}.in_proj_z.weight"]
    stem = f"{STEM}{LAYER}.in_proj_z."
    tensors = {f"{stem}lora_A.weight": torch.ones(3, K), f"{stem}lora_B.weight": torch.ones(N, 3)}
    settings = {"r": 3, "lora_alpha": 8}
    assert read(tensors.items(), settings, config).keys() == {f"{LAYER}.in_proj_qkvz"}
    tensors[STEM + name] = torch.ones(shape)
    with pytest.raises(AdapterError, match=message) as raised:
        read(tensors.items(), settings, config)
    assert name.partition(".lora")[0] in str(raised.value)


def test_settings_that_would_be_ignored_are_refused():
    config = Qwen3NextConfig.from_hf(FLAT)
    with pytest.raises(AdapterError, match="alpha_pattern"):
        read([], {"r": 3, "lora_alpha": 8, "alpha_pattern": {"q_proj": 1}}, config)
    with pytest.raises(AdapterError, match="no tensors"):
        read([], {"r": 3, "lora_alpha": 8}, config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "holds a list"),
        ({}, "lora_alpha = None: must be a number"),
        ({"lora_alpha": "16"}, "lora_alpha = '16': must be a number"),
        ({"lora_alpha": 16}, r"adapter_model\.safetensors.* damaged, download it again"),
    ],
    ids=str,
)
def test_a_damaged_adapter_is_named(tmp_path, settings, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    write_file(tmp_path / "adapter_model.safetensors", {"a": 3} if settings else {}, 0)
    with pytest.raises(AdapterError, match=message):
        check_stored(tmp_path, Qwen3NextConfig.from_hf(BASE))
