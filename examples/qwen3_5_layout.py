"""Write a Qwen3-Next checkpoint in the layout of Qwen3.5: the same weights under other names.

The linear projections are no longer grouped by key head, all experts of a layer are one tensor, and
a vision-language checkpoint nests the text model. What a model computes stays the same.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

TEXT, TEXT_IN_WRAPPER = "model.", "model.language_model."
KEPT = (  # fields that both layouts have
    *("attention_bias", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "torch_dtype", "full_attention_interval", "head_dim", "hidden_act", "hidden_size"),
    *("initializer_range", "intermediate_size", "layer_types", "linear_conv_kernel_dim"),
    *("linear_key_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    *("linear_value_head_dim", "max_position_embeddings", "num_attention_heads"),
    *("num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings"),
    *("use_cache", "vocab_size"),
)
KEPT_WITH_EXPERTS = (
    *("moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("router_aux_loss_coef", "shared_expert_intermediate_size"),
)
# Fields without a place in Qwen3.5's config → the value that all its models have.
FIXED: Mapping[str, Any] = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
IMAGE_TOKENS = {  # field of the config → the token, where the tokenizer has it
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
VISION = {  # a tower of one small layer
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [],
}


def qwen3_5_config(
    raw: Mapping[str, Any], *, wrapped: bool, tokens: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Any]:
    """The config.json of a Qwen3-Next config in the other layout; raises ValueError.

    `tokens` are the tokenizer's special tokens: those of images go into a wrapped config.
    """
    experts = bool(raw.get("num_experts"))
    for name, value in FIXED.items():
        if experts and raw.get(name, value) != value:
            raise ValueError(f"{name} = {raw[name]!r}: Qwen3.5 has {value!r} only")
    kind, family = ("qwen3_5_moe", "Qwen3_5Moe") if experts else ("qwen3_5", "Qwen3_5")
    kept = KEPT + (KEPT_WITH_EXPERTS if experts else ())
    text = {name: raw[name] for name in kept if raw.get(name) is not None}
    text |= {
        "model_type": f"{kind}_text",
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "rope_parameters": _rope(raw),
    }
    if not wrapped:
        return {"architectures": [f"{family}ForCausalLM"]} | text
    return {
        "architectures": [f"{family}ForConditionalGeneration"],
        "model_type": kind,
        "text_config": text,
        "vision_config": VISION | {"model_type": kind, "out_hidden_size": raw["hidden_size"]},
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
    } | {  # ids beyond the vocabulary are in no text
        field: tokens.get(token, raw["vocab_size"] + i)
        for i, (field, token) in enumerate(IMAGE_TOKENS.items())
    }


def qwen3_5_tensors(
    tensors: Mapping[str, torch.Tensor], raw: Mapping[str, Any], *, wrapped: bool, fused: bool
) -> Tensors:
    """The same weights in the other layout; with `wrapped`, a random vision tower beside them."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith("in_proj_qkvz.weight"):
            out |= _flat_qkvz(name, tensor, raw)
        elif name.endswith("in_proj_ba.weight"):
            out |= _flat_ba(name, tensor, raw)
        else:
            out[name] = tensor
    if fused:
        out = _fused(out, raw.get("num_experts") or 0)
    if not wrapped:
        return out
    renamed = {_wrapped(name): tensor for name, tensor in out.items()}
    return renamed | _vision_tower(raw, tensors["model.norm.weight"].dtype)


def rewrite(source: Path, out: Path, *, wrapped: bool = False, fused: bool = True) -> Path:
    """Write the checkpoint in folder `source` to folder `out`; returns that. Raises ValueError."""
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config = qwen3_5_config(raw, wrapped=wrapped, tokens=_special_tokens(source))
    tensors: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    out.mkdir(parents=True, exist_ok=True)
    new = qwen3_5_tensors(tensors, raw, wrapped=wrapped, fused=fused)
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for pattern in ("tokenizer*", "generation_config.json", "chat_template*", "vocab*", "merges*"):
        for path in source.glob(pattern):
            shutil.copyfile(path, out / path.name)
    return out


def main(
    source: Annotated[Path, typer.Argument(help="Folder of a Qwen3-Next checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    wrapped: Annotated[
        bool, typer.Option(help="As a vision-language model, with an untrained vision tower.")
    ] = False,
    split_experts: Annotated[
        bool, typer.Option(help="A tensor for each expert, as quantised checkpoints have them.")
    ] = False,
) -> None:
    """Write SOURCE to OUT in the layout of Qwen3.5."""
    try:
        rewrite(source, out, wrapped=wrapped, fused=not split_experts)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    print(f"wrote {out}")


def _special_tokens(source: Path) -> dict[str, int]:
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    return {token["content"]: token["id"] for token in tokenizer["added_tokens"]}


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """With the sections of an image's three axes, which a text's positions share."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        rope.setdefault(name, raw.get(name))
    rope.setdefault("rope_type", "default")
    pairs = int(raw["head_dim"] * rope["partial_rotary_factor"]) // 2
    sections = [(pairs + 2 - axis) // 3 for axis in range(3)]  # 32 → 11, 11, 10
    return rope | {"mrope_interleaved": True, "mrope_section": sections}


def _flat_qkvz(name: str, weight: torch.Tensor, raw: Mapping[str, Any]) -> Tensors:
    """From [q | k | R values | R gates] of each key head to all q, all k, all values; all gates."""
    H, K = raw["linear_num_key_heads"], raw["linear_key_head_dim"]
    V = raw["linear_num_value_heads"] // H * raw["linear_value_head_dim"]  # of a key head
    parts = weight.view(H, 2 * K + 2 * V, -1).split([K, K, V, V], dim=1)
    q, k, v, z = (part.flatten(0, 1) for part in parts)
    stem = name.removesuffix("qkvz.weight")
    return {f"{stem}qkv.weight": torch.cat([q, k, v]), f"{stem}z.weight": z.contiguous()}


def _flat_ba(name: str, weight: torch.Tensor, raw: Mapping[str, Any]) -> Tensors:
    """From [R b | R a] of each key head to all b; all a."""
    H = raw["linear_num_key_heads"]
    b, a = weight.view(H, 2, -1, weight.shape[1]).unbind(1)
    stem = name.removesuffix("ba.weight")
    return {
        f"{stem}{part}.weight": w.flatten(0, 1).contiguous() for part, w in (("b", b), ("a", a))
    }


def _fused(tensors: Tensors, num_experts: int) -> Tensors:
    """One tensor for all gate and up projections of a layer, and one for all down projections."""
    out = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    stems = {name.partition(".experts.")[0] for name in tensors.keys() - out.keys()}
    for stem in sorted(stems):
        experts = [f"{stem}.experts.{e}" for e in range(num_experts)]
        gate, up, down = (
            torch.stack([tensors[f"{expert}.{part}_proj.weight"] for expert in experts])
            for part in ("gate", "up", "down")
        )
        out[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)  # [E, 2I, D]
        out[f"{stem}.experts.down_proj"] = down  # [E, D, I]
    return out


def _wrapped(name: str) -> str:
    return TEXT_IN_WRAPPER + name.removeprefix(TEXT) if name.startswith(TEXT) else name


def _vision_tower(raw: Mapping[str, Any], dtype: torch.dtype) -> Tensors:
    """A random tower, so that hosts find the tensors that they look for."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionConfig, Qwen3_5VisionModel

    torch.manual_seed(0)
    config = Qwen3_5VisionConfig(**VISION, out_hidden_size=raw["hidden_size"])
    tower = Qwen3_5VisionModel(config).state_dict()
    return {f"model.visual.{name}": tensor.to(dtype) for name, tensor in tower.items()}


if __name__ == "__main__":
    typer.run(main)
