"""Checkpoint names, layouts and files: every tensor is accounted for, every fault is named."""

import json
import os
import subprocess
import sys
from collections import deque

import pytest
import torch
from safetensors.torch import save_file

from checkpoints import BASE, SHAPES, random_tensors
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.headers import check_files
from qwen3next_plugin.model.checkpoint.reading import (
    check_scales,
    checked,
    parameters,
    require_mtp,
)
from qwen3next_plugin.model.checkpoint.tensors import all_tensors, mtp_tensors, trunk_tensors
from qwen3next_plugin.model.linear_attention import shard_channels

ORDER = """
import json, sys
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.tensors import all_tensors
print(json.dumps([*all_tensors(Qwen3NextConfig.from_hf(json.loads(sys.argv[1])))]))
"""
SHAPES_OF = {"a.weight": (2, 3), "b.weight": (4,)}


def tensors(**changes) -> list[tuple[str, torch.Tensor]]:
    """The tensors of SHAPES_OF, some changed (given by name, dots as underscores) or dropped."""
    shapes = SHAPES_OF | {name.replace("_", "."): shape for name, shape in changes.items()}
    return [(name, torch.zeros(shape)) for name, shape in shapes.items() if shape is not None]


@pytest.mark.parametrize("changes", [{}, *SHAPES.values()], ids=["base", *SHAPES])
def test_names_and_shapes_are_what_transformers_loads(tmp_path, changes):
    """Our tensors are exactly those that transformers expects."""
    from checkpoints import write_checkpoint
    from reference import Reference

    Reference(write_checkpoint(tmp_path, **changes))  # asserts that nothing is missing or left


def test_names_of_a_rank_are_the_models():
    config = Qwen3NextConfig.from_hf(BASE, tp_size=2)
    assert trunk_tensors(config) == trunk_tensors(Qwen3NextConfig.from_hf(BASE))


def test_tensors_are_in_the_same_order_in_every_process():
    command = [sys.executable, "-c", ORDER, json.dumps(BASE)]
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [*all_tensors(Qwen3NextConfig.from_hf(BASE))]


def test_passes_what_is_expected_in_order():
    given = tensors()
    assert list(checked(given, expected=SHAPES_OF)) == given


@pytest.mark.parametrize(
    ("layout", "changes"), [("grouped", {}), ("flat", {"model_type": "qwen3_5_moe_text"})]
)
def test_a_layer_or_expert_is_loaded_once_all_its_tensors_are(layout, changes):
    config = Qwen3NextConfig.from_hf(BASE | changes)
    assert config.layout == layout
    given, taken, begun, done = random_tensors(BASE | changes), [], {}, {}
    expected = trunk_tensors(config) | mtp_tensors(config)

    class Told:
        def begin(self, part: str) -> None:
            begun[part] = [*taken]

        def end(self, part: str) -> None:
            done[part] = [*taken]

    for name, _ in parameters(given.items(), config, expected=expected, parts=Told()):
        taken.append(name)
    layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)] + ["mtp.layers.0"]
    experts = [f"{name}.mlp.experts.{i}" for name in layers for i in range(config.num_experts)]
    assert sorted(done) == sorted(begun) == sorted(layers + experts)
    for part, before in begun.items():
        assert not any(name.startswith(f"{part}.") for name in before)
    for part, before in done.items():
        assert {name for name in taken if name.startswith(f"{part}.")} <= {*before}
    twice = [*given.items(), ("model.layers.0.input_layernorm.weight", torch.zeros(64))]
    with pytest.raises(
        CheckpointError, match=r"layers\.0\.input_layernorm\.weight is in two files"
    ):
        deque(parameters(twice, config, expected=expected, parts=Told()), maxlen=0)


def test_ignored_tensors_may_come_and_are_dropped():
    given = tensors(mtp_weight=(7,))
    found = checked(given, expected=SHAPES_OF, ignored={"mtp.weight", "absent"})
    assert [name for name, _ in found] == list(SHAPES_OF)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b_weight": None}, r"1 tensors are missing, the first is b\.weight"),
        ({"a_weight": None, "b_weight": None}, r"2 tensors are missing, the first is a\.weight"),
        ({"c_weight": (5,)}, r"unexpected tensor c\.weight \(5,\)"),
        ({"a_weight": (3, 2)}, r"a\.weight has shape \(3, 2\), the config asks for \(2, 3\)"),
        ({"b_weight": (4, 1)}, r"b\.weight has shape \(4, 1\)"),
    ],
)
def test_fault_is_named(changes, message):
    with pytest.raises(CheckpointError, match=message):
        list(checked(tensors(**changes), expected=SHAPES_OF))


def test_quantised_tensors_stand_for_their_weight():
    parts = [f"a.{last}" for last in ("qweight", "scales", "weight_packed", "weight_zero_point")]
    given = [*((name, torch.zeros(1)) for name in parts), *tensors(a_weight=None)]
    names = [name for name, _ in checked(given, expected=SHAPES_OF, quantised=True)]
    assert names == [*parts, "b.weight"]
    with pytest.raises(CheckpointError, match=r"unexpected tensor a\.qweight"):
        list(checked(given, expected=SHAPES_OF))
    with pytest.raises(CheckpointError, match=r"unexpected tensor a\.foo"):
        list(checked([("a.foo", torch.zeros(1))], expected=SHAPES_OF, quantised=True))


def test_quantised_tensors_of_another_model_are_dropped_with_their_weight():
    given = [("mtp.weight_scale_inv", torch.zeros(1)), ("a.weight_scale_inv", torch.zeros(1))]
    given += tensors(mtp_weight=(3,))
    found = checked(given, expected=SHAPES_OF, ignored={"mtp.weight"}, quantised=True)
    assert [name for name, _ in found] == ["a.weight_scale_inv", *SHAPES_OF]
    with pytest.raises(CheckpointError, match=r"unexpected tensor c\.weight_scale_inv"):
        list(checked([("c.weight_scale_inv", torch.zeros(1))], expected=SHAPES_OF, quantised=True))


def test_missing_scales_are_named():
    scales = ["layers.0.experts.w13_weight_scale_inv", "layers.0.o_proj.weight_scale"]
    parameters = [*scales, "layers.0.o_proj.weight", "layers.0.o_proj.input_scale"]
    check_scales(parameters, parameters[:3])
    missing = r"2 scales are missing, .* modules_to_not_convert"
    with pytest.raises(CheckpointError, match=missing) as e:
        check_scales(parameters, ["layers.0.o_proj.weight"])
    assert f"the first is {scales[0]}" in str(e.value)


# the drafter's share -----------------------------------------------------------------------------


def test_trunk_and_drafter_share_no_name():
    config = Qwen3NextConfig.from_hf(BASE)
    assert not trunk_tensors(config).keys() & mtp_tensors(config).keys()
    assert all(name.startswith("mtp.") for name in mtp_tensors(config))


def test_checkpoint_without_mtp_is_told_apart():
    config = Qwen3NextConfig.from_hf(BASE)
    with_mtp = random_tensors(BASE).items()
    assert len(list(require_mtp(with_mtp, config))) == len(with_mtp)
    with pytest.raises(CheckpointError, match=r"no mtp\.\* tensors .* serve without"):
        list(require_mtp(random_tensors(BASE, mtp=False).items(), config))


# layouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
def test_conv_shards_hold_their_heads_channels(size):
    dims = (6, 6, 12)
    weight = torch.arange(24).view(24, 1, 1).expand(24, 1, 4)
    shards = [shard_channels(weight, dims, rank, size) for rank in range(size)]
    by_rank = [shard.split([d // size for d in dims]) for shard in shards]  # q, k, v of each rank
    q, k, v = (torch.cat(parts) for parts in zip(*by_rank, strict=True))
    assert torch.equal(torch.cat([q, k, v]), weight)


# files -------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_file({"a": torch.zeros(100)}, tmp_path / "model-00001.safetensors")
    save_file({"b": torch.zeros(7, 3)}, tmp_path / "model-00002.safetensors", {"format": "pt"})
    return tmp_path


def test_whole_files_pass(folder):
    check_files(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 20, -1, -60])
def test_truncated_file_is_named(folder, keep):
    path = folder / "model-00002.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model-00002\.safetensors has \d+ bytes"):
        check_files(folder)


def test_file_with_a_tail_is_named(folder):
    path = folder / "model-00001.safetensors"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match=r"model-00001\.safetensors .* truncated or damaged"):
        check_files(folder)


def test_damaged_header_is_named(folder):
    path = folder / "model-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its header cannot be used"):
        check_files(folder)


def test_stored_tensors_are_those_of_the_index(tmp_path):
    """Names and shapes come from the headers; a file that the index does not list is ignored."""
    first, second = {"a": torch.zeros(3, 5), "b": torch.zeros(())}, {"c": torch.zeros(2, 0, 7)}
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    save_file(first, tmp_path / "other.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    stored = list(stored_tensors(tmp_path))
    assert {name: tuple(x.shape) for name, x in stored} == {"a": (3, 5), "b": (), "c": (2, 0, 7)}
    assert len(stored) == 3
    assert all(x.device.type == "meta" for _, x in stored)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(list(stored_tensors(tmp_path))) == 5
