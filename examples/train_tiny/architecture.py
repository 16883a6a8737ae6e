"""A very small Qwen3-Next: transformers' trunk, and an MTP head made of transformers' layers."""

import torch
from torch import Tensor, nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextDecoderLayer,
    Qwen3NextRMSNorm,
)

from .tokenizer import SPECIALS, VOCAB_SIZE

FULL_ATTENTION_INTERVAL = 4


def tiny_config() -> Qwen3NextConfig:
    """The released model's head dims and rules, with a width of 256 and four layers."""
    return Qwen3NextConfig(
        architectures=["Qwen3NextForCausalLM"],
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=256,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000_000.0,
            "partial_rotary_factor": 0.25,
        },
        max_position_embeddings=32768,
        bos_token_id=SPECIALS.index("<|endoftext|>"),
        pad_token_id=SPECIALS.index("<|endoftext|>"),
        eos_token_id=SPECIALS.index("<|im_end|>"),
        full_attention_interval=FULL_ATTENTION_INTERVAL,
        num_nextn_predict_layers=1,
        dtype="bfloat16",
    )


class MTP(nn.Module):
    """Multi-token prediction: one full-attention decoder layer over embedding and hidden."""

    def __init__(self, config: Qwen3NextConfig):
        super().__init__()
        D, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(2 * D, D, bias=False)
        self.pre_fc_norm_embedding = Qwen3NextRMSNorm(D, eps)
        self.pre_fc_norm_hidden = Qwen3NextRMSNorm(D, eps)
        full = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3NextDecoderLayer(config, full)])
        self.norm = Qwen3NextRMSNorm(D, eps)

    def forward(
        self,
        embeds: Tensor,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        past_key_values=None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """One depth for every position; without a mask attention is causal.

        Shapes: embeds [B, T, D] of the token after each position, hidden [B, T, D] → [B, T, D].
        """
        both = (self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden))
        x = self.fc(torch.cat(both, dim=-1))
        x = self.layers[0](
            x,
            position_embeddings=rope,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
        )
        return self.norm(x)


class TinyQwen3Next(nn.Module):
    """Trunk and MTP head, as in the checkpoint."""

    def __init__(self, config: Qwen3NextConfig):
        super().__init__()
        config._experts_implementation = "grouped_mm"
        self.trunk = Qwen3NextForCausalLM(config).float()
        self.mtp = MTP(config).float()
        self.mtp.apply(self.trunk._init_weights)

    @property
    def config(self) -> Qwen3NextConfig:
        return self.trunk.config

    def hidden(self, ids: Tensor) -> Tensor:
        """The trunk's final-norm hidden states [B, T, D]."""
        return self.trunk.model(input_ids=ids, use_cache=False).last_hidden_state

    def rope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables for positions 0…T-1 of x [B, T, D]."""
        positions = torch.arange(x.shape[1])[None]
        return self.trunk.model.rotary_emb(x, positions)

    def drafts(self, ids: Tensor, hidden: Tensor, depths: int) -> list[Tensor]:
        """MTP hidden states of depth 1…depths; depth d at i has read ids up to i+d.

        Shapes: ids [B, T+depths], hidden [B, T, D] → depths tensors [B, T, D].
        """
        T = hidden.shape[1]
        rope, out = self.rope(hidden), []
        for depth in range(1, depths + 1):
            embeds = self.trunk.model.embed_tokens(ids[:, depth : depth + T])
            hidden = self.mtp(embeds, hidden, rope)
            out.append(hidden)
        return out
