"""The benchmark of other engines: their models are the whole block model, in the same formats."""

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import block_model
from benchmarks.peers import gguf_model, w8a8_model
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.tensors import trunk_tensors
from qwen3next_plugin.model.quantisation.at_load import quantised_bytes

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 16,
}
IN_INT8 = {"output", "attn_q", "attn_k", "attn_v", "attn_output"}  # of a file in 4 bits
PLAIN = {  # of a quantised GGUF file: BF16, or F32
    *("token_embd", "output_norm", "attn_norm", "post_attention_norm"),
    *("attn_q_norm", "attn_k_norm", "ssm_conv1d", "ssm_norm", "ssm_ba", "ssm_a", "ssm_dt"),
    *("ffn_gate_inp", "ffn_gate_inp_shexp"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The block model with small layers, in one file."""
    folder = tmp_path_factory.mktemp("block-model")
    config = block_model.CONFIG | SMALL
    shapes = block_model.tensors(config)
    save_file(block_model.random_tensors(shapes, shapes), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_gguf_file_has_every_tensor_of_the_trunk(checkpoint):
    config = Qwen3NextConfig.from_hf(json.loads((checkpoint / "config.json").read_text()))
    read = set()
    with ExitStack() as stack:
        where = gguf_model.files(checkpoint, stack)

        def reading(name):
            read.add(name)
            return where[name].get_tensor(name)

        formats = {
            name: (tensor(), gguf_model.format_of(name, tensor(), "Q4_0"))
            for name, tensor in gguf_model.named(config, reading)
        }
    assert read == set(trunk_tensors(config))
    for name, (tensor, chosen) in formats.items():
        part = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        assert (chosen in ("BF16", "F32")) == (part in PLAIN), name
        assert (chosen == "Q8_0") == (part in IN_INT8), name
        assert tensor.dim() == 1 + (part not in PLAIN or tensor.dim() == 2) + ("exps" in part)


def test_heads_of_q_k_v_and_z_stand_apart():
    """The checkpoint has them side by side for each key head."""
    K = 16
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": K,
        "linear_value_head_dim": K,
    }
    config = replace(Qwen3NextConfig.from_hf(block_model.CONFIG), **sizes)
    heads = ["q0", "k0", "v0", "v1", "z0", "z1", "q1", "k1", "v2", "v3", "z2", "z3"]
    weight = torch.arange(len(heads)).repeat_interleave(K)[:, None]
    parts = gguf_model.qkvz(config, "", lambda name: weight)
    assert [[heads[row] for row in part[::K].flatten().tolist()] for part in parts] == [
        ["q0", "q1", "k0", "k1", "v0", "v1", "v2", "v3"],
        ["z0", "z1", "z2", "z3"],
    ]


def test_w8a8_leaves_what_the_plugin_leaves(checkpoint, tmp_path):
    folder = w8a8_model.w8a8_model(checkpoint, tmp_path / "w8a8")
    found = load_file(folder / "model.safetensors")
    given = load_file(checkpoint / "model.safetensors")
    quantised = {name for name, tensor in found.items() if tensor.dtype == torch.int8}
    trunk = trunk_tensors(Qwen3NextConfig.from_hf(block_model.CONFIG | SMALL))
    assert quantised == set(quantised_bytes("int8", trunk)) - {"lm_head.weight"}
    for name in quantised:
        back = found[name] * found[f"{name}_scale"]
        assert (back - given[name].float()).abs().le(found[f"{name}_scale"] * 0.501).all()
    assert {n for n in found if not n.endswith("_scale")} == {
        name for name in given if not name.startswith("mtp.")
    }
