"""Name and shape of every tensor of a checkpoint that is not quantised."""

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.checkpoint.layouts import SHARD, Shapes, in_projections
from qwen3next_plugin.model.kinds import Frame, kind_of

MTP = "mtp."  # prefix of the MTP head's tensors
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def all_tensors(config: Qwen3NextConfig) -> Shapes:
    """Name and shape of every tensor of the trunk and the MTP head."""
    return trunk_tensors(config) | mtp_tensors(config)


def trunk_tensors(config: Qwen3NextConfig) -> Shapes:
    """Name and shape of every tensor of the trunk, in the released checkpoint's names."""
    D, vocab, frame = config.hidden_size, config.vocab_size, _frame(config)
    tensors: Shapes = {EMBEDDING: (vocab, D)}
    tensors |= {f"model.{name}": shape for name, shape in frame.end.items()}
    if not config.tie_word_embeddings:
        tensors[HEAD] = (vocab, D)
    for i, layer_type in enumerate(config.layer_types):
        layer = _layer(config, frame, layer_type, is_moe=config.is_moe_layer(i))
        layer |= frame.layers.get(i, {})
        tensors |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def loaded_tensors(config: Qwen3NextConfig) -> Shapes:
    """The trunk's tensors that become parameters: all but n-gram tables."""
    trunk = trunk_tensors(config).items()
    return {name: shape for name, shape in trunk if not SHARD.search(name)}


def not_loaded_tensors(config: Qwen3NextConfig) -> set[str]:
    """Tensors that the trunk does not load: the MTP head's, and n-gram tables."""
    return all_tensors(config).keys() - loaded_tensors(config).keys()


def mtp_tensors(config: Qwen3NextConfig) -> Shapes:
    """Name and shape of every MTP tensor. Embedding and lm_head are shared with the trunk."""
    if not config.num_nextn_predict_layers:
        return {}
    frame = _frame(config)
    outside = frame.mtp_input | frame.end
    tensors = {f"mtp.{name}": shape for name, shape in outside.items()}
    for i in range(config.num_nextn_predict_layers):
        layer = _layer(config, frame, "full_attention", is_moe=config.num_experts > 0)
        tensors |= {f"mtp.layers.{i}.{name}": shape for name, shape in layer.items()}
    return tensors


def name_in_drafter(name: str) -> str:
    """The name of a tensor or module in a drafter, where the MTP layer has the trunk's prefix."""
    return "model." + name.removeprefix(MTP) if name.startswith(MTP) else name


def _layer(config: Qwen3NextConfig, frame: Frame, layer_type: str, *, is_moe: bool) -> Shapes:
    """Name within the layer and shape of every tensor of one decoder layer."""
    linear = layer_type == "linear_attention"
    mixer = _linear_attention(config) if linear else _attention(config) | frame.attention
    return mixer | _mlp(config, is_moe) | frame.residual


def _frame(config: Qwen3NextConfig) -> Frame:
    """The family's, or that of a kind of model of its own."""
    if kind := kind_of(config):
        return kind.frame(config)
    D = config.hidden_size
    return Frame(
        residual={"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)},
        end={"norm.weight": (D,)},
        mtp_input={
            "fc.weight": (D, 2 * D),
            "pre_fc_norm_embedding.weight": (D,),
            "pre_fc_norm_hidden.weight": (D,),
        },
        attention={},
        layers={},
    )


def _linear_attention(config: Qwen3NextConfig) -> Shapes:
    D, HV = config.hidden_size, config.linear_num_value_heads
    return in_projections(config) | {
        "linear_attn.conv1d.weight": (config.conv_dim, 1, config.linear_conv_kernel_dim),
        "linear_attn.A_log": (HV,),
        "linear_attn.dt_bias": (HV,),
        "linear_attn.norm.weight": (config.linear_value_head_dim,),
        "linear_attn.out_proj.weight": (D, config.value_dim),
    }


def _attention(config: Qwen3NextConfig) -> Shapes:
    D, head_dim = config.hidden_size, config.head_dim
    channels = {  # the query projection yields query and gate
        "q_proj": config.q_proj_size,
        "k_proj": config.kv_proj_size,
        "v_proj": config.kv_proj_size,
    }
    shapes: Shapes = {f"self_attn.{name}.weight": (n, D) for name, n in channels.items()}
    shapes["self_attn.o_proj.weight"] = (D, config.attention_dim)
    if config.attention_bias:
        shapes |= {f"self_attn.{name}.bias": (n,) for name, n in channels.items()}
        shapes["self_attn.o_proj.bias"] = (D,)
    return shapes | {f"self_attn.{name}_norm.weight": (head_dim,) for name in ("q", "k")}


def _mlp(config: Qwen3NextConfig, is_moe: bool) -> Shapes:
    D = config.hidden_size
    if not is_moe:
        return _swiglu("mlp.", D, config.intermediate_size)
    shapes: Shapes = {"mlp.gate.weight": (config.num_experts, D)}
    for i in range(config.num_experts):
        shapes |= _swiglu(f"mlp.experts.{i}.", D, config.moe_intermediate_size)
    if config.shared_expert_intermediate_size:
        shapes |= _swiglu("mlp.shared_expert.", D, config.shared_expert_intermediate_size)
        shapes["mlp.shared_expert_gate.weight"] = (1, D)
    return shapes


def _swiglu(prefix: str, D: int, intermediate: int) -> Shapes:
    return {
        f"{prefix}gate_proj.weight": (intermediate, D),
        f"{prefix}up_proj.weight": (intermediate, D),
        f"{prefix}down_proj.weight": (D, intermediate),
    }
