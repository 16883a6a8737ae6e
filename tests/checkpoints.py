"""Random Qwen3-Next checkpoints of odd shapes, laid out as the released ones are."""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.tensors import mtp_tensors, trunk_tensors

SHIPPED = Path(__file__).parents[1] / "examples" / "qwen3next-tiny"
VOCAB = 512
BASE = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "attention_bias": False,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "eos_token_id": 1,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 8192,
    "mlp_only_layers": [],
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "shared_expert_intermediate_size": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
}
# What a kernel or a loader may have taken for granted, each broken once.
SHAPES: Mapping[str, dict] = {
    "HV=H_K<V_6-layers": {
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 64,
        "num_hidden_layers": 6,
    },
    "HV=4H_dense-layers_top-3-of-12": {
        "linear_num_value_heads": 8,
        "mlp_only_layers": [0, 5],
        "num_hidden_layers": 7,
        "num_experts": 12,
        "num_experts_per_tok": 3,
    },
    "tied_bias_one-kv-head": {
        "tie_word_embeddings": True,
        "attention_bias": True,
        "num_key_value_heads": 1,
        "num_hidden_layers": 4,
    },
    "H=3_attention-every-2_head-dim-64_yarn": {
        "linear_num_key_heads": 3,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 48,
        "full_attention_interval": 2,
        "head_dim": 64,
        "hidden_size": 96,
        "max_position_embeddings": 2048,
        "num_hidden_layers": 5,
        "partial_rotary_factor": 0.5,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000,
            "partial_rotary_factor": 0.5,
            "factor": 4.0,
            "original_max_position_embeddings": 2048,
        },
    },
}


def write_checkpoint(
    folder: Path, *, seed: int = 0, mtp: bool = True, dtype: torch.dtype = torch.float32, **changes
) -> Path:
    """Write BASE with `changes`, weights drawn from `seed`, and a tokenizer; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = BASE | changes
    tensors = random_tensors(raw, seed=seed, mtp=mtp)
    save_file({name: t.to(dtype) for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    write_tokenizer(folder)
    return folder


def write_scrambled(folder: Path, *, seed: int = 0) -> Path:
    """The shipped checkpoint with the rows of its MTP matrices in random order."""
    shutil.copytree(SHIPPED, folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if name.startswith("mtp.") and tensor.ndim == 2:
            tensors[name] = tensor[torch.randperm(len(tensor), generator=generator)]
    save_file(tensors, folder / "model.safetensors")
    return folder


def random_tensors(raw: Mapping, *, seed: int = 0, mtp: bool = True) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, so scaled that the state matters and tokens are clear-cut."""
    config = Qwen3NextConfig.from_hf(raw)
    shapes = trunk_tensors(config) | (mtp_tensors(config) if mtp else {})
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: _draw(name, shapes[name], config, generator) for name in sorted(shapes)}
    if "lm_head.weight" in tensors:  # a pull towards the next id: what a drafter can learn
        pull = tensors["model.embed_tokens.weight"].roll(1, dims=0) / math.sqrt(config.hidden_size)
        tensors["lm_head.weight"] += 2.0 * pull
    return tensors


def _draw(
    name: str, shape: tuple[int, ...], config: Qwen3NextConfig, generator: torch.Generator
) -> torch.Tensor:
    """One tensor, by what it is."""
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if name.endswith("A_log"):
        return (1 + 15 * uniform).log()
    if name.endswith("dt_bias"):  # a step of 0.001 to 0.1: decays from forgetful to patient
        dt = torch.exp(math.log(1e-3) + uniform * math.log(100))
        return dt + (-torch.expm1(-dt)).log()
    if name.endswith("linear_attn.norm.weight"):
        return 1 + 0.1 * normal
    if name.endswith(("norm.weight", "layernorm.weight", "hidden.weight", "embedding.weight")):
        return 0.1 * normal  # zero-centred
    if name.endswith("conv1d.weight"):
        return 0.5 * normal
    if name.endswith("bias"):
        return 0.1 * normal
    if name == "mtp.fc.weight":  # mostly the token at hand, so that many drafts are accepted
        return torch.cat([torch.eye(shape[0]), 0.05 * normal[:, shape[0] :]], dim=1)
    if name == "model.embed_tokens.weight":
        return normal * (0.2 if config.tie_word_embeddings else 1.0)
    if name == "lm_head.weight":
        return 3.0 * normal / math.sqrt(shape[-1])
    if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
        return 0.5 * normal / math.sqrt(shape[-1])
    return normal / math.sqrt(shape[-1])


def write_tokenizer(folder: Path, *, extra: Sequence[str] = ()) -> None:
    """A byte-level BPE of VOCAB entries, with a chat template, as Hugging Face reads them.

    `extra` are further special tokens, from id 3 on.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        min_frequency=1,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "bos_token": specials[0],
        "eos_token": specials[1],
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def random_prompt(length: int, *, seed: int = 0) -> tuple[int, ...]:
    """`length` token ids, no special one among them."""
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())
