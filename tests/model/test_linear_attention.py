"""What the neutral linear layer hands to its kernel."""

import torch
from torch import nn
from torch.func import functional_call

from checkpoints import BASE
from model.plain import PLAIN
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.linear_attention import LinearAttention


class Layer(LinearAttention):
    def forward(self):
        return self.weights


def test_weights_are_those_of_now():
    """Hosts replace parameters when they load others, or for one call."""
    layer = Layer(Qwen3NextConfig.from_hf(BASE), PLAIN, "linear_attn", rank=0)
    parameters = dict(layer.named_parameters())
    names = {"A_log": "A_log", "dt_bias": "dt_bias", "conv1d.weight": "conv", "norm.weight": "norm"}
    for value, (name, field) in enumerate(names.items()):
        of_call = {name: torch.full_like(parameters[name], value)}
        assert (getattr(functional_call(layer, of_call), field) == value).all()
        owner, _, last = name.rpartition(".")
        new = nn.Parameter(torch.full_like(parameters[name], value + 10))
        setattr(layer.get_submodule(owner), last, new)
        assert (getattr(layer.weights, field) == value + 10).all()
    assert layer.weights.conv.shape == parameters["conv1d.weight"].squeeze(1).shape
