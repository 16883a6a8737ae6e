"""What a config must satisfy to be served, and the error that names field, value and fix."""

from qwen3next_plugin.config import rope
from qwen3next_plugin.config.errors import check_count, complaint
from qwen3next_plugin.config.fields import OF_SIZES
from qwen3next_plugin.config.sizes import CONV_WIDTH, LAYER_TYPES, Sizes

MAX_HEAD_DIM = 256  # of linear attention
MOST_EXPERTS = 2**17  # in all layers; each has three tensors, which are listed by name


def check(c: Sizes) -> None:
    """Raise ConfigError unless the kernels and the engines can run this model on these ranks."""
    _check_numbers(c)
    _check_layers(c)
    _check_attention(c)
    rope.check(c.rope_parameters, c.head_dim)
    c.check_own()
    _check_feed_forward(c)
    _check_ranks(c)


def _check_numbers(c: Sizes) -> None:
    for name, check_field in OF_SIZES.items():
        check_field(name, getattr(c, name))
    if not 0 < c.rms_norm_eps < 1:
        raise complaint("rms_norm_eps", c.rms_norm_eps, "must be between 0 and 1 (1e-06)")
    if c.hidden_act != "silu":
        raise complaint("hidden_act", c.hidden_act, "the kernels compute 'silu' only")


def _check_layers(c: Sizes) -> None:
    if unknown := sorted({str(t) for t in c.layer_types if t not in LAYER_TYPES}):
        raise complaint("layer_types", unknown, f"use {' and '.join(LAYER_TYPES)} only")
    if len(c.layer_types) != c.num_hidden_layers:
        fix = f"num_hidden_layers is {c.num_hidden_layers}; override both together"
        raise complaint("len(layer_types)", len(c.layer_types), fix)
    if (dense := len(c.mlp_only_layers)) > c.num_hidden_layers:
        fix = f"num_hidden_layers is {c.num_hidden_layers}"
        raise complaint("len(mlp_only_layers)", dense, fix)
    for i in c.mlp_only_layers:
        if type(i) is not int or not 0 <= i < c.num_hidden_layers:
            raise complaint("mlp_only_layers", i, f"layers are 0 to {c.num_hidden_layers - 1}")


def _check_attention(c: Sizes) -> None:
    if c.num_attention_heads % c.num_key_value_heads:
        fix = f"must be a multiple of num_key_value_heads = {c.num_key_value_heads}"
        raise complaint("num_attention_heads", c.num_attention_heads, fix)
    if c.linear_num_value_heads % c.linear_num_key_heads:
        fix = f"must be a multiple of linear_num_key_heads = {c.linear_num_key_heads}"
        raise complaint("linear_num_value_heads", c.linear_num_value_heads, fix)
    for name in ("linear_key_head_dim", "linear_value_head_dim"):
        if (dim := getattr(c, name)) % 16 or dim > MAX_HEAD_DIM:
            fix = f"no kernel has it; must be a multiple of 16, at most {MAX_HEAD_DIM}"
            raise complaint(name, dim, fix)
    if c.linear_conv_kernel_dim != CONV_WIDTH:
        fix = f"the convolution kernels are of width {CONV_WIDTH} only"
        raise complaint("linear_conv_kernel_dim", c.linear_conv_kernel_dim, fix)
    if c.head_dim % 2:
        raise complaint("head_dim", c.head_dim, "no kernel has it; must be even")


def _check_feed_forward(c: Sizes) -> None:
    if c.num_moe_layers < c.num_hidden_layers:
        check_count("intermediate_size", c.intermediate_size)
    if c.num_experts:
        if (experts := c.num_moe_layers * c.num_experts) > MOST_EXPERTS:
            fix = f"{experts} in all layers, and {MOST_EXPERTS} are the most"
            raise complaint("num_experts", c.num_experts, fix)
        check_count("moe_intermediate_size", c.moe_intermediate_size)
        check_count("num_experts_per_tok", c.num_experts_per_tok)
        if c.num_experts_per_tok > c.num_experts:
            fix = f"cannot exceed num_experts = {c.num_experts}"
            raise complaint("num_experts_per_tok", c.num_experts_per_tok, fix)


def _check_ranks(c: Sizes) -> None:
    names = ("linear_num_key_heads", "linear_num_value_heads", "num_attention_heads")
    for name in names:
        if getattr(c, name) % c.tp_size:
            raise complaint("tp_size", c.tp_size, f"does not divide {name} = {getattr(c, name)}")
    if c.num_key_value_heads % c.tp_size and c.tp_size % c.num_key_value_heads:
        fix = f"neither divides nor is a multiple of num_key_value_heads = {c.num_key_value_heads}"
        raise complaint("tp_size", c.tp_size, fix)
    if c.pp_size > c.num_hidden_layers:
        fix = f"more stages than num_hidden_layers = {c.num_hidden_layers}"
        raise complaint("pp_size", c.pp_size, fix)
