"""The two models of claim.py: one block of each, two blocks to check it, and their parameters.

A block of Qwen3-Next is a linear and an attention layer, one of Qwen3-32B is a layer. Shapes and
vocabulary are the released ones, weights are random. Files of layers are shared by symbolic links.
"""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.block_model import RELEASED, Shapes, by_layer
from benchmarks.report import RedCheckError, Run
from qwen3next_plugin.config import Qwen3NextConfig, read_config
from qwen3next_plugin.model.checkpoint.tensors import trunk_tensors

DENSE, NEXT = "Qwen3-32B", "Qwen3-Next-80B-A3B"
LINEAR, FULL = "linear_attention", "full_attention"
POSITIONS = 2**18
LAYERS = {DENSE: {FULL: 64}, NEXT: {LINEAR: 36, FULL: 12}}  # released
BLOCK = {DENSE: [FULL], NEXT: [LINEAR, FULL]}
GB = 10**9
ROOM = 6 * GB  # for all but the weights: code, caches, a layer while it is packed

QWEN3_32B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "vocab_size": 151936,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "attention_bias": False,
    "tie_word_embeddings": False,
}


def released(model: str) -> dict[str, Any]:
    """The released config."""
    return dict(QWEN3_32B) if model == DENSE else read_config(RELEASED / NEXT)


def config_of(model: str, blocks: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config of so many blocks."""
    config = released(model)
    config |= {name: size for name, size in changes.items() if name in config}
    layer_types = BLOCK[model] * blocks
    config |= {"num_hidden_layers": len(layer_types), "max_position_embeddings": POSITIONS}
    if model == NEXT:
        config |= {"layer_types": layer_types, "full_attention_interval": len(BLOCK[model])}
        config |= {"num_nextn_predict_layers": 0}
    return config


def tensors(model: str, config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor, without MTP."""
    if model == NEXT:
        return trunk_tensors(Qwen3NextConfig.from_hf(config))
    D, vocab, wide = (config[f"{name}_size"] for name in ("hidden", "vocab", "intermediate"))
    heads, kv_heads, head_dim = (
        config[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    layer = {
        "self_attn.q_proj": (heads * head_dim, D),
        "self_attn.k_proj": (kv_heads * head_dim, D),
        "self_attn.v_proj": (kv_heads * head_dim, D),
        "self_attn.o_proj": (D, heads * head_dim),
        "self_attn.q_norm": (head_dim,),
        "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (wide, D),
        "mlp.up_proj": (wide, D),
        "mlp.down_proj": (D, wide),
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
    }
    shapes = {f"{name}.weight": (vocab, D) for name in ("model.embed_tokens", "lm_head")}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (D,)}


def parameters(model: str) -> dict[str, int]:
    """Parameters of each tensor of the released model, without MTP."""
    return {name: prod(shape) for name, shape in tensors(model, released(model)).items()}


def active(model: str) -> dict[str, int]:
    """Those of them that one token uses: of the routed experts `num_experts_per_tok` a layer."""
    chosen = released(model).get("num_experts_per_tok", 0)

    def used(name: str) -> bool:
        expert = name.partition(".mlp.experts.")[2]
        return not expert or int(expert.split(".")[0]) < chosen

    return {name: n for name, n in parameters(model).items() if used(name)}


def experts_with_room() -> int:
    """All experts, or as many as memory has room for in two blocks."""
    free = available_memory()
    for experts in (512, 256, 128, 64):
        config = config_of(NEXT, 2, {"num_experts": experts})
        if 2 * sum(map(prod, tensors(NEXT, config).values())) + ROOM <= free:
            return experts
    raise RedCheckError(f"{free / GB:.1f} GB of memory are free, too few for 64 experts")


def available_memory() -> int:
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    found = dict(line.split(":") for line in lines)
    return 1024 * int(found["MemAvailable"].split()[0])


def written(run: Run, model: str, blocks: int, changes: Mapping[str, int]) -> Path:
    """Write a model into the output folder unless it is there; two blocks link to one's files."""
    config = config_of(model, blocks, changes)
    sizes = changes["num_experts"] if model == NEXT else "released"
    folder = run.out / "claim" / f"{model}-{sizes}-{blocks}"
    if blocks > 1:
        folder.mkdir(parents=True, exist_ok=True)
        for file in written(run, model, 1, changes).glob("*.safetensors"):
            if not (link := folder / file.name).exists():
                link.symlink_to(file.resolve())
    return by_layer(folder, config, tensors(model, config))
