"""The MTP head is the equation of docs/architecture.md."""

import torch
from torch import nn

from checkpoints import BASE
from model.plain import Projection
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.kernels.rms_norm import Unnormed, normed
from qwen3next_plugin.model.decoder_layer import DecoderLayer
from qwen3next_plugin.mtp.head import MTPHead

CONFIG = Qwen3NextConfig.from_hf(BASE)
D, EPS = CONFIG.hidden_size, CONFIG.rms_norm_eps


class Mixer(nn.Module):
    """Not attention, but something of each of its arguments."""

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor | Unnormed, scale: float
    ) -> torch.Tensor:
        return scale * positions[:, None] * normed(x).flip(-1)


class MLP(nn.Linear):
    def forward(self, x: torch.Tensor | Unnormed) -> torch.Tensor:
        return super().forward(normed(x))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (1 + weight)


@torch.inference_mode()
def test_agrees_with_the_equation():
    torch.manual_seed(5)
    mlps = [MLP(D, D), MLP(D, D)]
    layers = [DecoderLayer(CONFIG, layer_type="full_attention", mixer=Mixer(), mlp=m) for m in mlps]
    fc = Projection(2 * D, D, bias=False)
    head = MTPHead(CONFIG, embed_tokens=nn.Embedding(3, D), fc=fc, layers=layers)
    for name, parameter in head.named_parameters():
        if "norm" in name:
            parameter.normal_(std=0.3)
    positions, e, h = torch.tensor([4, 0, 7]), torch.randn(3, D), torch.randn(3, D)
    for i, (layer, mlp) in enumerate(zip(layers, mlps, strict=True)):
        x = torch.cat(
            [norm(e, head.pre_fc_norm_embedding.weight), norm(h, head.pre_fc_norm_hidden.weight)],
            dim=-1,
        )
        x = x @ fc.weight.T
        x = x + Mixer()(positions, norm(x, layer.input_layernorm.weight), 0.1)
        x = x + mlp(norm(x, layer.post_attention_layernorm.weight))
        found = head.predict(positions, e.clone(), h.clone(), 0.1, layer=i)
        torch.testing.assert_close(found, norm(x, head.norm.weight), rtol=1e-5, atol=1e-5)
