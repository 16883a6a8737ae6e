"""A checkpoint as a GGUF file, as llama.cpp and ik_llama.cpp read it.

A bf16 checkpoint gets the formats of QWEN3NEXT_QUANTISE, tensor by tensor: Q8_0 for int8; Q4_0 for
int4, with head and full attention in Q8_0; embedding and `in_proj_ba` in BF16, vectors and routers
in F32. A checkpoint in 4 bits (compressed-tensors, groups of a multiple of 32) keeps its values:
Q4_0 has a scale for every 32 of them.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors import safe_open

from benchmarks.report import console
from qwen3next_plugin.config import Qwen3NextConfig

GGUF = Path(".peers/llama.cpp")  # has gguf, too
BLOCK, BLOCK_BYTES = 32, 18  # columns of a block of Q4_0; a scale in fp16, and 16 bytes
Read = Callable[[str], torch.Tensor]  # by the checkpoint's name; blocks of Q4_0 are bytes

# Tensors of a layer in GGUF's names, with the checkpoint's.
LAYER = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
ATTENTION = {
    "attn_q": "self_attn.q_proj",  # each head's query and gate side by side, as there
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
LINEAR = {
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
KEPT = {
    "token_embd.weight": "BF16",
    "ssm_ba.weight": "BF16",
    "output.weight": "Q8_0",
    **{f"attn_{part}.weight": "Q8_0" for part in ("q", "k", "v", "output")},
}
FLOATS = ("ffn_gate_inp.weight", "ssm_conv1d.weight", "ssm_a", "ssm_dt.bias")


def gguf_model(checkpoint: Path, path: Path, kind: str) -> Path:
    """Write a checkpoint's trunk in `kind` (BF16, Q8_0, Q4_0) to `path` unless it is there."""
    if path.exists():
        return path
    sys.path.insert(0, str(GGUF.resolve()))
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    raw = json.loads((checkpoint / "config.json").read_text())
    config = Qwen3NextConfig.from_hf(raw)
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "qwen3next")
    metadata(writer, raw)
    with ExitStack() as stack:
        where = files(checkpoint, stack)
        formats = {}
        for name, tensor in named(config, partial(described, where)):
            value = tensor()
            chosen = formats[name] = GGMLQuantizationType[format_of(name, value, kind)]
            shape = value.shape
            if value.dtype != torch.uint8:
                shape = quant_shape_to_byte_shape(shape, chosen)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), math.prod(shape), chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        tensors = list(named(config, partial(read, where)))
        for name, tensor in track(tensors, f"writing {path.name}", console=console):
            value = tensor()
            if value.dtype != torch.uint8:
                data = quantize(value.float().contiguous().numpy(), formats[name])
            else:
                data = value.contiguous().numpy()
            writer.write_tensor_data(data)
        writer.close()
    part.rename(path)
    return path


def read(where: Mapping[str, Any], name: str) -> torch.Tensor:
    """A tensor, or the blocks of one that is stored in 4 bits."""
    if name in where:
        return where[name].get_tensor(name)
    parts = [f"{name}_{part}" for part in ("packed", "scale")]
    return q4_0(*(where[part].get_tensor(part) for part in parts))


def described(where: Mapping[str, Any], name: str) -> torch.Tensor:
    """What `read` returns, without its values."""
    if name in where:
        return torch.empty(where[name].get_slice(name).get_shape(), device="meta")
    N, words = where[f"{name}_packed"].get_slice(f"{name}_packed").get_shape()
    return torch.empty(N, 8 * words // BLOCK * BLOCK_BYTES, dtype=torch.uint8, device="meta")


def q4_0(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Blocks of Q4_0 with the values of a weight of compressed-tensors.

    Shapes: packed [N, K / 8] int32, scale [N, groups], returns [N, K / 32 * 18] uint8
    """
    halves = scale.half()
    if not torch.equal(halves.to(scale.dtype), scale):
        raise ValueError("a scale is not one of fp16")
    words = packed.view(torch.uint8).unflatten(1, (-1, BLOCK // 2))
    values = torch.stack([words & 15, words >> 4], dim=-1).flatten(2)  # [N, K / 32, 32]
    low, high = values.chunk(2, dim=2)
    halves = halves.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    return torch.cat([halves[..., None].view(torch.uint8), low | high << 4], dim=2).flatten(1)


def format_of(name: str, value: torch.Tensor, kind: str) -> str:
    """A tensor's format in a file of `kind`."""
    own = name.split(".", 2)[2] if name.startswith("blk.") else name
    if value.dtype == torch.uint8:
        return "Q4_0"
    if value.dim() == 1 or own in FLOATS:
        return "F32"
    return kind if kind == "BF16" else KEPT.get(own, kind)


def metadata(writer: Any, config: Mapping[str, Any]) -> None:
    """What llama.cpp reads of a model; no tokenizer."""
    rope = config["rope_parameters"]
    value_heads = config["linear_num_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config.get("intermediate_size", 0))  # of dense layers
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(config["head_dim"] * rope["partial_rotary_factor"]))
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(value_heads)
    writer.add_ssm_inner_size(config["linear_value_head_dim"] * value_heads)
    writer.add_full_attention_interval(config["full_attention_interval"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")


def files(checkpoint: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor of a checkpoint, by the tensor's name."""
    opened = [stack.enter_context(safe_open(p, "pt")) for p in checkpoint.glob("*.safetensors")]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (no mapping)


def named(config: Qwen3NextConfig, read: Read) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every tensor of the trunk in GGUF's names, read when it is called."""
    yield "token_embd.weight", lambda: read("model.embed_tokens.weight")
    yield "output_norm.weight", lambda: read("model.norm.weight") + 1
    yield "output.weight", lambda: read("lm_head.weight")
    for layer, kind in enumerate(config.layer_types):
        for name, tensor in layer_tensors(config, kind, f"model.layers.{layer}.", read).items():
            yield f"blk.{layer}.{name}", tensor


def layer_tensors(
    config: Qwen3NextConfig, kind: str, prefix: str, read: Read
) -> dict[str, Callable[[], torch.Tensor]]:
    """A layer's tensors in GGUF's names."""
    linear = kind == "linear_attention"
    names = LAYER | (LINEAR if linear else ATTENTION)

    def plain(name: str) -> torch.Tensor:
        value = read(f"{prefix}{name}.weight").squeeze()
        centred = name.endswith("norm") and name != "linear_attn.norm"
        return value.float() + 1 if centred else value

    def experts(part: str) -> torch.Tensor:
        names = [f"mlp.experts.{e}.{part}_proj.weight" for e in range(config.num_experts)]
        return torch.stack([read(prefix + name) for name in names])  # [E, N, K]

    found = {f"{name}.weight": lambda n=theirs: plain(n) for name, theirs in names.items()}
    found |= {
        f"ffn_{part}_exps.weight": lambda p=part: experts(p) for part in ("gate", "up", "down")
    }
    if linear:
        found |= {
            "ssm_a": lambda: -read(f"{prefix}linear_attn.A_log").float().exp(),
            "ssm_dt.bias": lambda: read(f"{prefix}linear_attn.dt_bias"),
            "attn_qkv.weight": lambda: qkvz(config, prefix, read)[0],
            "attn_gate.weight": lambda: qkvz(config, prefix, read)[1],
            "ssm_ba.weight": lambda: ba(config, prefix, read),
        }
    return found


def qkvz(config: Qwen3NextConfig, prefix: str, read: Read) -> list[torch.Tensor]:
    """Rows of q, k and v, and of z; a grouped checkpoint keeps all side by side for each head."""
    if config.layout == "flat":
        return [read(f"{prefix}linear_attn.in_proj_{part}.weight") for part in ("qkv", "z")]
    heads, K = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.value_dim // heads
    grouped = read(f"{prefix}linear_attn.in_proj_qkvz.weight").unflatten(0, (heads, -1))
    q, k, v, z = (rows.flatten(0, 1) for rows in grouped.split([K, K, values, values], dim=1))
    return [torch.cat([q, k, v]), z]


def ba(config: Qwen3NextConfig, prefix: str, read: Read) -> torch.Tensor:
    """Rows of b and a side by side for each key head, as a grouped checkpoint keeps them."""
    if config.layout == "grouped":
        return read(f"{prefix}linear_attn.in_proj_ba.weight")
    parts = [read(f"{prefix}linear_attn.in_proj_{part}.weight") for part in ("b", "a")]
    heads = [rows.unflatten(0, (config.linear_num_key_heads, -1)) for rows in parts]
    return torch.cat(heads, dim=1).flatten(0, 1)
