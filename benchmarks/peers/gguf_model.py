"""The block model as a GGUF file, as llama.cpp and ik_llama.cpp read it.

Formats are those of QWEN3NEXT_QUANTISE, tensor by tensor: Q8_0 for int8; Q4_0 for int4, with head
and full attention in Q8_0; embedding and `in_proj_ba` in BF16, vectors and routers in F32.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open

from benchmarks.report import console

GGUF = Path(".peers/llama.cpp")  # has gguf, too
Read = Callable[[str], torch.Tensor]  # by the checkpoint's name

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
    "ssm_ba": "linear_attn.in_proj_ba",
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
    from gguf.quants import quantize

    config = json.loads((checkpoint / "config.json").read_text())
    part = path.with_suffix(".part")
    writer = GGUFWriter(part, "qwen3next")
    metadata(writer, config)
    with ExitStack() as stack:
        where = files(checkpoint, stack)
        tensors = list(named(config, lambda name: where[name].get_tensor(name)))
        for name, tensor in track(tensors, f"writing {path.name}", console=console):
            value = tensor()
            chosen = GGMLQuantizationType[format_of(name, value, kind)]
            data = quantize(value.float().contiguous().numpy(), chosen)
            writer.add_tensor(name, data, raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    part.rename(path)
    return path


def format_of(name: str, value: torch.Tensor, kind: str) -> str:
    """A tensor's format in a file of `kind`."""
    own = name.split(".", 2)[2] if name.startswith("blk.") else name
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
    writer.add_feed_forward_length(config["intermediate_size"])
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


def named(
    config: Mapping[str, Any], read: Read
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Every tensor of the trunk in GGUF's names, read when it is called."""
    yield "token_embd.weight", lambda: read("model.embed_tokens.weight")
    yield "output_norm.weight", lambda: read("model.norm.weight") + 1
    yield "output.weight", lambda: read("lm_head.weight")
    for layer, kind in enumerate(config["layer_types"]):
        for name, tensor in layer_tensors(config, kind, f"model.layers.{layer}.", read).items():
            yield f"blk.{layer}.{name}", tensor


def layer_tensors(
    config: Mapping[str, Any], kind: str, prefix: str, read: Read
) -> dict[str, Callable[[], torch.Tensor]]:
    """A layer's tensors in GGUF's names."""
    linear = kind == "linear_attention"
    names = LAYER | (LINEAR if linear else ATTENTION)

    def plain(name: str) -> torch.Tensor:
        value = read(f"{prefix}{name}.weight").squeeze()
        centred = name.endswith("norm") and name != "linear_attn.norm"
        return value.float() + 1 if centred else value

    def experts(part: str) -> torch.Tensor:
        names = [f"mlp.experts.{e}.{part}_proj.weight" for e in range(config["num_experts"])]
        return torch.stack([read(prefix + name) for name in names])  # [E, N, K]

    found = {f"{name}.weight": lambda n=theirs: plain(n) for name, theirs in names.items()}
    found |= {
        f"ffn_{part}_exps.weight": lambda p=part: experts(p) for part in ("gate", "up", "down")
    }
    if linear:
        found |= {
            "ssm_a": lambda: -read(f"{prefix}linear_attn.A_log").float().exp(),
            "ssm_dt.bias": lambda: read(f"{prefix}linear_attn.dt_bias"),
            "attn_qkv.weight": lambda: torch.cat(qkvz(config, prefix, read)[:3]),
            "attn_gate.weight": lambda: qkvz(config, prefix, read)[3],
        }
    return found


def qkvz(config: Mapping[str, Any], prefix: str, read: Read) -> list[torch.Tensor]:
    """Rows of q, k, v and z, which the checkpoint keeps side by side for each key head."""
    heads, K = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    grouped = read(f"{prefix}linear_attn.in_proj_qkvz.weight").unflatten(0, (heads, -1))
    return [rows.flatten(0, 1) for rows in grouped.split([K, K, values, values], dim=1)]
