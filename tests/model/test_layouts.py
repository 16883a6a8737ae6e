"""Checkpoints in Qwen3.5's layout give the parameters that Qwen3-Next's layout gives."""

from collections.abc import Mapping

import pytest
import torch

from checkpoints import BASE, SHAPES, random_tensors
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.gated_delta_net import Projections
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.layouts import output_sizes
from qwen3next_plugin.model.checkpoint.reading import parameters, require_mtp
from qwen3next_plugin.model.checkpoint.tensors import mtp_tensors, trunk_tensors
from qwen3next_plugin.model.gated_delta_net import shape_of

FLAT = BASE | {"model_type": "qwen3_5_moe_text"}
Tensors = dict[str, torch.Tensor]


def flat_rows(config: Qwen3NextConfig) -> dict[str, torch.Tensor]:
    """Of each flat projection, which rows of the grouped one it has, head by head."""
    H, K = config.linear_num_key_heads, config.linear_key_head_dim
    R = config.linear_num_value_heads // H
    RV = R * config.linear_value_head_dim
    rows: dict[str, list[int]] = {name: [] for name in ("q", "k", "v", "z", "b", "a")}
    at = 0
    for _ in range(H):
        for name, count in (("q", K), ("k", K), ("v", RV), ("z", RV)):
            rows[name] += range(at, at + count)
            at += count
    for h in range(H):
        rows["b"] += range(2 * R * h, 2 * R * h + R)
        rows["a"] += range(2 * R * h + R, 2 * R * (h + 1))
    rows["qkv"] = rows.pop("q") + rows.pop("k") + rows.pop("v")
    return {name: torch.tensor(index) for name, index in rows.items()}


def flattened(tensors: Tensors, config: Qwen3NextConfig, *, fused: bool, prefix: str) -> Tensors:
    """The tensors in Qwen3.5's layout."""
    rows, found = flat_rows(config), {}
    for name, tensor in tensors.items():
        stem, _, last = name.removesuffix(".weight").rpartition("in_proj_")
        if last in ("qkvz", "ba"):
            for part in ("qkv", "z") if last == "qkvz" else ("b", "a"):
                found[f"{stem}in_proj_{part}.weight"] = tensor[rows[part]]
        elif fused and ".experts." in name:
            continue
        else:
            found[name] = tensor
    if fused:
        for layer in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
            gate, up, down = (
                torch.stack([tensors[f"{layer}.experts.{e}.{kind}_proj.weight"] for e in range(8)])
                for kind in ("gate", "up", "down")
            )
            found[f"{layer}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            found[f"{layer}.experts.down_proj"] = down
    found["model.visual.blocks.0.weight"] = torch.zeros(1)
    return {
        prefix + name.removeprefix("model.") if name.startswith("model.l") else name: tensor
        for name, tensor in found.items()
    }


def read(tensors: Mapping[str, torch.Tensor], raw: Mapping, **options) -> Tensors:
    config = Qwen3NextConfig.from_hf(raw)
    trunk, mtp = trunk_tensors(config), mtp_tensors(config)
    both = parameters(tensors.items(), config, expected=trunk | mtp, **options)
    found = list(both)
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3), (2, 8)], ids=str)
def test_both_layouts_give_the_same_bits(heads, prefix, fused):
    H, HV = heads
    changes = {"linear_num_key_heads": H, "linear_num_value_heads": HV, "num_hidden_layers": 5}
    grouped = random_tensors(BASE | changes)
    config = Qwen3NextConfig.from_hf(FLAT | changes)
    flat = flattened(grouped, config, fused=fused, prefix=prefix)
    found = read(flat, FLAT | changes)
    assert found.keys() == grouped.keys() == read(grouped, BASE | changes).keys()
    assert all(torch.equal(found[name], grouped[name]) for name in grouped)


@pytest.mark.parametrize("heads", [(2, 2), (2, 4), (1, 3), (2, 8)], ids=str)
def test_both_layouts_of_projections_are_the_same_views(heads):
    """Of a flat layer, as it is with LoRA, and of a grouped one."""
    H, HV = heads
    config = Qwen3NextConfig.from_hf(
        FLAT | {"linear_num_key_heads": H, "linear_num_value_heads": HV}
    )
    rows = flat_rows(config)
    qkvz, ba = (torch.randn(5, *output_sizes(config, name, "grouped")) for name in ("qkvz", "ba"))
    flat = Projections(
        qkvz[:, torch.cat([rows["qkv"], rows["z"]])],
        ba[:, torch.cat([rows["b"], rows["a"]])],
        shape_of(config, "flat"),
    )
    grouped = Projections(qkvz, ba, shape_of(config))
    assert all(torch.equal(*pair) for pair in zip(flat.heads(), grouped.heads(), strict=True))


def test_order_of_tensors_does_not_matter():
    grouped = random_tensors(BASE)
    flat = flattened(grouped, Qwen3NextConfig.from_hf(FLAT), fused=True, prefix="model.")
    found = read(dict(sorted(flat.items(), reverse=True)), FLAT)
    assert all(torch.equal(found[name], grouped[name]) for name in grouped)


def test_dense_and_tied():
    changes = SHAPES["tied_bias_one-kv-head"] | {"num_experts": 0}
    grouped = random_tensors(BASE | changes)
    raw = BASE | changes | {"model_type": "qwen3_5_text"}
    flat = flattened(grouped, Qwen3NextConfig.from_hf(raw), fused=False, prefix="model.")
    assert read(flat, raw).keys() == grouped.keys()


IN_PROJ = "model.layers.0.linear_attn.in_proj_"
EXPERTS = "model.layers.2.mlp.experts"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{IN_PROJ}z.weight": None}, rf"first is {IN_PROJ}z\.weight"),
        ({f"{IN_PROJ}qkvz.weight": (256, 64)}, rf"unexpected tensor {IN_PROJ}qkvz"),
        ({f"{IN_PROJ}b.weight": (3, 64)}, rf"{IN_PROJ}b\.weight has shape \(3, 64\)"),
        ({f"{EXPERTS}.down_proj": (7, 64, 32)}, rf"{EXPERTS}\.down_proj has shape \(7, 64, 32\)"),
        ({f"{EXPERTS}.gate_up_proj": None}, rf"first is {EXPERTS}\.0\.gate_proj\.weight"),
    ],
)
def test_fault_is_named(changes, message):
    flat = flattened(
        random_tensors(BASE), Qwen3NextConfig.from_hf(FLAT), fused=True, prefix="model."
    )
    for name, shape in changes.items():
        flat.pop(name, None)
        if shape:
            flat[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError, match=message):
        read(flat, FLAT)


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj_packed", "down_proj_weight_scale"])
def test_quantised_experts_in_one_tensor_are_refused(part):
    """As llm-compressor 0.12.0 wrote them, say."""
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.{part}: experts that are quantised in"):
        read({f"{EXPERTS}.{part}": torch.zeros(8, 64, 32, dtype=torch.uint8)}, FLAT)


def test_tensors_of_the_other_layout_are_refused():
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*in_proj_"):
        read(random_tensors(BASE), FLAT)
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*in_proj_"):
        read(random_tensors(FLAT), BASE)


def test_scales_of_blocks_follow_their_rows():
    """One scale for 16 rows: heads of 32 and of 2x16 rows have whole ones."""
    config = Qwen3NextConfig.from_hf(FLAT)
    tensors, rows = random_tensors(FLAT), flat_rows(config)
    scales = torch.arange(256 // 16)[:, None].float()  # of the grouped rows
    per_row = scales.repeat_interleave(16, dim=0)
    for part in ("qkv", "z"):
        tensors[f"{IN_PROJ}{part}.weight_scale_inv"] = per_row[rows[part]][::16]
    found = read(tensors, FLAT, quantised=True)
    assert torch.equal(found[f"{IN_PROJ}qkvz.weight_scale_inv"], scales)


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"qkv": (2, 1), "z": (1, 1)}, r"in_proj_qkv\.weight_scale \(2, 1\) cannot be split"),
        ({"qkv": (), "z": ()}, r"in_proj_qkv\.weight_scale \(\) cannot be split"),
        ({"qkv": (192, 1)}, r"in_proj_qkvz\.weight_scale cannot be joined"),
    ],
)
def test_scales_that_do_not_follow_are_refused(scales, message):
    tensors = random_tensors(FLAT)
    tensors |= {
        f"{IN_PROJ}{part}.weight_scale": torch.zeros(shape) for part, shape in scales.items()
    }
    with pytest.raises(CheckpointError, match=f"{message}.* leaves linear_attn"):
        read(tensors, FLAT, quantised=True)


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp."])
def test_mtp_part_is_found(prefix):
    config = Qwen3NextConfig.from_hf(FLAT)
    tensors = {
        prefix + name.removeprefix("mtp.") if name.startswith("mtp.") else name: tensor
        for name, tensor in random_tensors(FLAT).items()
    }
    assert len(list(require_mtp(tensors.items(), config))) == len(tensors)
    assert read(tensors, FLAT).keys() >= mtp_tensors(config).keys()
