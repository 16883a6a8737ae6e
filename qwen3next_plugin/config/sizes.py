"""The sizes of a model: the fields of its config, and what follows from them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qwen3next_plugin.config import rope

Layout = Literal["grouped", "flat"]  # of a checkpoint; model/checkpoint/layouts.py describes both
CONV_WIDTH = 4  # of the convolution kernels
LAYER_TYPES = ("linear_attention", "full_attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Those of one model on `tp_size` ranks; fields are named as in config.json."""

    layout: Layout = "grouped"
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    max_position_embeddings: int
    # full attention
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_parameters: Mapping[str, Any] = field(hash=False)
    attention_bias: bool = False
    # linear attention
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    # feed-forward: the sizes of a kind of layer that the model lacks are 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    # head and drafter
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 1
    # where it runs
    tp_size: int = 1
    pp_size: int = 1

    # what a kind of model with a class of its own may have otherwise
    def check_own(self) -> None:
        """Raise ConfigError unless the fields beside those above can be computed."""

    @property
    def sigmoid_gate(self) -> bool:
        """Whether linear attention's output gate is a sigmoid, not SiLU."""
        return False

    # layers
    @property
    def num_linear_layers(self) -> int:
        return self.layer_types.count("linear_attention")

    @property
    def num_attention_layers(self) -> int:
        return self.layer_types.count("full_attention")

    @property
    def num_moe_layers(self) -> int:
        return sum(map(self.is_moe_layer, range(self.num_hidden_layers)))

    def is_moe_layer(self, i: int) -> bool:
        """Whether layer `i` of the trunk routes to experts, not through one dense MLP."""
        sparse = self.num_experts > 0 and (i + 1) % self.decoder_sparse_step == 0
        return sparse and i not in self.mlp_only_layers

    # full attention
    @property
    def mrope_section(self) -> tuple[int, ...]:
        """Pairs rotated by time, height and width, interleaved; () for text models."""
        return tuple(self.rope_parameters.get("mrope_section") or ())

    @property
    def rotary_dim(self) -> int:
        return rope.rotary_dim(self.rope_parameters, self.head_dim)

    @property
    def max_length(self) -> int:
        """Positions that RoPE covers: with YaRN, the original ones times its factor."""
        return rope.length(self.rope_parameters, self.max_position_embeddings)

    @property
    def attention_dim(self) -> int:
        """Columns of the query, of its output gate, and of o_proj's input."""
        return self.num_attention_heads * self.head_dim

    @property
    def q_proj_size(self) -> int:
        """Query and output gate."""
        return 2 * self.attention_dim

    @property
    def kv_proj_size(self) -> int:
        """Key, or value."""
        return self.num_key_value_heads * self.head_dim

    # linear attention
    @property
    def key_dim(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution over [q; k; v]."""
        return 2 * self.key_dim + self.value_dim

    # one tensor-parallel rank
    @property
    def num_attention_heads_per_rank(self) -> int:
        return self.num_attention_heads // self.tp_size

    @property
    def num_key_value_heads_per_rank(self) -> int:
        """At least one: with more ranks than key-value heads, ranks hold copies."""
        return max(1, self.num_key_value_heads // self.tp_size)

    @property
    def linear_num_key_heads_per_rank(self) -> int:
        return self.linear_num_key_heads // self.tp_size

    @property
    def linear_num_value_heads_per_rank(self) -> int:
        return self.linear_num_value_heads // self.tp_size

    @property
    def value_dim_per_rank(self) -> int:
        return self.value_dim // self.tp_size

    @property
    def conv_dim_per_rank(self) -> int:
        return self.conv_dim // self.tp_size
