"""Write a small random checkpoint of Qwen4-Exp (Qwen3.8-Flash-Next), with an MTP head.

It has every part of the released model: streams, n-grams, an indexer, experts. It was not trained,
so it writes no text; it shows that a server computes what it should.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.extras.qwen4_exp.ngrams import hashing
from qwen3next_plugin.model.checkpoint.tensors import mtp_tensors, trunk_tensors

TOKENIZER = Path(__file__).parent / "qwen3next-tiny"
CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen4ExpForCausalLM"],
    "model_type": "qwen4_exp_text",
    "attention_bias": False,
    "dtype": "float32",
    "eos_token_id": 1,
    "full_attention_interval": 4,
    "head_dim": 32,
    "heads_per_ngram": 8,
    "hc_count": 4,
    "hc_lowrank": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    "indexer_head_dim": 16,
    "indexer_kv_heads": 1,
    "indexer_n_heads": 16,  # of few, all products with a key may be negative, and blocks tie
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "make_ngram_vocab_size_divisible_by": 128,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 32,
    "mtp_num_hidden_layers": 1,
    "ngram_size": 3,
    "ngram_vocab_size_base": 1000,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "output_gate_type": "sigmoid",
    "ple_conv_kernel_size": 4,
    "ple_embed_dim": 128,
    "ple_layer_ids": [2, 5],
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000,
        "partial_rotary_factor": 0.25,
    },
    "seed": 1234,
    "shared_expert_intermediate_size": 32,
    "split_ngram_parts": 8,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
# Of a matrix whose name ends so: how large its products are, where they are not about 1.
GAINS: Mapping[str, float] = {
    "out_proj.weight": 0.5,
    "o_proj.weight": 0.5,
    "down_proj.weight": 0.5,
    "input_mix_weight_down.weight": 4.0,  # it is divided by the number of streams
    "block_inject_weight.weight": 4.0,  # also
    "value_proj.weight": 0.5,
    "mtp.fc_hidden.weight": 0.05,
    "lm_head.weight": 3.0,
}
IMAGE_TOKENS = (
    *("image_token_id", "video_token_id"),
    *("vision_start_token_id", "vision_end_token_id"),
)


def random_tensors(raw: Mapping[str, Any], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor, so scaled that each part matters and that tokens are clear-cut."""
    config = Qwen3NextConfig.from_hf(raw)
    shapes = trunk_tensors(config) | mtp_tensors(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _draw(name, shapes[name], generator) for name in sorted(shapes)}
    # A pull towards the next id, which a drafter can learn: mostly from the token at hand.
    embedding = tensors["model.embed_tokens.weight"]
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] += 2.0 * embedding.roll(1, dims=0) / math.sqrt(config.hidden_size)
    if config.num_nextn_predict_layers:
        tensors["mtp.fc_embedding.weight"] = torch.eye(config.hidden_size)
    return tensors


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """One tensor, by what it is."""
    normal = torch.randn(shape, generator=generator)
    if name.endswith("A_log"):
        return (1 + 15 * torch.rand(shape, generator=generator)).log()
    if name.endswith("dt_bias"):  # a step of 0.001 to 0.1: decays from forgetful to patient
        dt = torch.exp(math.log(1e-3) + torch.rand(shape, generator=generator) * math.log(100))
        return dt + (-torch.expm1(-dt)).log()
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * normal
    if len(shape) == 1:  # zero-centred norms
        return 0.1 * normal
    if name.endswith("conv1d.weight"):
        return 0.5 * normal
    if name.endswith("embed_tokens.weight") or ".ngram_embedding." in name:
        return normal
    gain = next((gain for end, gain in GAINS.items() if name.endswith(end)), 1.0)
    return gain * normal / math.sqrt(shape[-1])


def hashes(raw: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What follows from the config, and is in a checkpoint all the same."""
    config = Qwen3NextConfig.from_hf(raw)
    tensors: dict[str, torch.Tensor] = {}
    for i in filter(config.has_ngrams, range(config.num_hidden_layers)):
        stem, of_layer = f"model.layers.{i}.ple.ple_embedding.", hashing(config, i)
        tensors[f"{stem}layer_multipliers"] = of_layer.multipliers
        tensors[f"{stem}ngram_heads_vocab_sizes"] = of_layer.sizes
        tensors[f"{stem}ngram_heads_offsets"] = of_layer.offsets
    return tensors


def fused(tensors: Mapping[str, torch.Tensor], num_experts: int) -> dict[str, torch.Tensor]:
    """With one tensor for all gate and up projections of a layer, one for all down projections."""
    out = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    for stem in sorted({name.partition(".experts.")[0] for name in tensors.keys() - out.keys()}):
        gate, up, down = (
            torch.stack(
                [tensors[f"{stem}.experts.{e}.{part}_proj.weight"] for e in range(num_experts)]
            )
            for part in ("gate", "up", "down")
        )
        out[f"{stem}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)  # [E, 2I, D]
        out[f"{stem}.experts.down_proj"] = down  # [E, D, I]
    return out


def write(out: Path, *, seed: int = 0, wrapped: bool = False, **changes: Any) -> Path:
    """Write CONFIG with `changes`, and random weights, to folder `out`; returns that."""
    raw = CONFIG | changes
    tensors = fused(random_tensors(raw, seed=seed), raw["num_experts"]) | hashes(raw)
    config = dict(raw)
    if wrapped:
        config = _wrapped(raw)
        tensors = {
            "model.language_model." + name.removeprefix("model.")
            if name.startswith("model.")
            else name: tensor
            for name, tensor in tensors.items()
        }
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text('{"do_sample": false}\n', encoding="utf-8")
    return out


def _wrapped(raw: Mapping[str, Any]) -> dict[str, Any]:
    text = {name: value for name, value in raw.items() if name != "architectures"}
    return {
        "architectures": ["Qwen4ExpForConditionalGeneration"],
        "model_type": "qwen4_exp",
        "text_config": text,
        "vision_config": {"model_type": "qwen4_exp_vision", "out_hidden_size": raw["hidden_size"]},
        "tie_word_embeddings": raw["tie_word_embeddings"],
    } | {field: raw["vocab_size"] + i for i, field in enumerate(IMAGE_TOKENS)}  # in no text


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    wrapped: Annotated[
        bool, typer.Option(help="As a vision-language model, whose tower is left out.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a small random checkpoint to OUT."""
    tokens = json.loads((TOKENIZER / "config.json").read_text(encoding="utf-8"))
    own = {name: tokens[name] for name in ("vocab_size", "eos_token_id")}
    write(out, seed=seed, wrapped=wrapped, **own)
    for pattern in ("tokenizer*", "chat_template*", "vocab*", "merges*"):
        for path in TOKENIZER.glob(pattern):
            shutil.copyfile(path, out / path.name)
    print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
