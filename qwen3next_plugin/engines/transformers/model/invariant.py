"""The host's model on the layers that the engines run: QWEN3NEXT_BATCH_INVARIANT=1.

A token's logits then have the bits that vLLM and SGLang compute with that variable, in any batch
and with any drafts. The host's modules keep the parameters, as it loads and saves them. Packed
copies are kept until a parameter changes; writing through `.data` is not noticed, so call
`model.eval()` after it. There are no gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import MoeModelOutputWithPast

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.transformers import flags
from qwen3next_plugin.engines.transformers.model.attention import make_attention
from qwen3next_plugin.engines.transformers.model.host_layers import host_layers
from qwen3next_plugin.engines.transformers.model.linear_attention import OnRows
from qwen3next_plugin.engines.transformers.model.moe import SparseMoE
from qwen3next_plugin.engines.transformers.state.cache import CACHE, RowCache
from qwen3next_plugin.engines.transformers.state.rows import Rows
from qwen3next_plugin.model.decoder_layer import DecoderLayer
from qwen3next_plugin.model.moe import SwiGLU
from qwen3next_plugin.model.norm import RMSNorm
from qwen3next_plugin.model.quantisation.packing import Packed, check_invariance, pack_plain

IN_FP32 = ("A_log", "dt_bias")  # parameters that the engines keep as precise as files have them


class Keeping(nn.Module):
    """Caches what is made from its parameters until one changes or train() or eval() is called."""

    def kept(self, make: Callable[[Any], Any]) -> Any:
        """The cached result of `make` for this module."""
        parameters = list(self.parameters())
        versions = [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in parameters]
        before = self.__dict__.get("_kept")
        if before is None or before[1] != versions or any(map(_differ, before[0], parameters)):
            self._kept: Any = None  # first give back the memory
            self._kept = (parameters, versions, make(self))
        return self._kept[2]

    def train(self, mode: bool = True) -> Any:
        self._kept = None
        return super().train(mode)


def _differ(one: nn.Parameter, other: nn.Parameter) -> bool:
    return one is not other


class Trunk(nn.Module):
    """The engines' decoder layers and final norm, from packed copies of the host's projections."""

    def __init__(self, of_host: Any) -> None:
        super().__init__()
        devices = {parameter.device.type for parameter in of_host.parameters()}
        check_invariance(of_host.dtype, on_cpu=devices == {"cpu"})
        config = Qwen3NextConfig.from_hf(of_host.config)
        with default_dtype(of_host.dtype):  # of the table of rotary positions
            layers = [make_decoder_layer(config, each, i) for i, each in enumerate(of_host.layers)]
            self.norm = adopt(RMSNorm(config.hidden_size, config.rms_norm_eps), of_host.norm)
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, rows: Rows, cache: RowCache) -> Tensor:
        """Shapes: x [T, D], the embeddings, returns [T, D]"""
        residual = None
        for layer in self.layers:
            x, residual = layer(rows.positions, x, residual, rows, cache)
        return self.norm(x, residual)


def make_decoder_layer(config: Qwen3NextConfig, of_host: Any, index: int) -> DecoderLayer:
    """The neutral decoder layer, from the host's parameters."""
    layer_type = config.layer_types[index]
    mixer: nn.Module
    if layer_type == "linear_attention":
        mixer = OnRows(config, of_host.linear_attn, index)
    else:
        mixer = make_attention(config, of_host.self_attn, index)
    mlp: nn.Module
    if config.is_moe_layer(index):
        mlp = SparseMoE(config, of_host.mlp)
    else:
        layers = host_layers(of_host.mlp)
        mlp = SwiGLU(config.hidden_size, config.intermediate_size, layers, "mlp")
    return adopt(DecoderLayer(config, layer_type=layer_type, mixer=mixer, mlp=mlp), of_host)


def adopt(layer: nn.Module, of_host: nn.Module) -> Any:
    """Replace the layer's parameters by the host's of the same names."""
    for name, _ in list(layer.named_parameters()):
        owner, _, last = name.rpartition(".")
        setattr(layer.get_submodule(owner), last, of_host.get_parameter(name))
    return layer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@cache
def invariant(host: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the host's headless model that computes as a `Trunk`."""

    class Model(Keeping, host):  # type: ignore[misc, valid-type]
        embed_tokens: Any
        config: Any

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Any = None,
            position_ids: Tensor | None = None,
            inputs_embeds: Tensor | None = None,
            **given: Any,
        ) -> MoeModelOutputWithPast:
            """Shapes: input_ids [B, n], inputs_embeds [B, n, D], returns [B, n, D]"""
            flags.check_pass(self, given)
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            x = x.detach()
            cache = given.get(CACHE)
            if isinstance(cache, RowCache):
                is_token, rows = Rows.of_step(cache.step.linear)
            else:
                mask = flags.mask(attention_mask, x)
                is_token, rows = Rows.of_batch(mask, flags.one_axis(position_ids, x))
                cache = RowCache(self.config.layer_types, num_drafts=0)
            flat = x.flatten(0, 1)
            hidden = torch.zeros_like(flat)
            with torch.no_grad():
                if cache.trunk is None:
                    cache.trunk = self.kept(Trunk)
                hidden[is_token] = cache.trunk(flat[is_token], rows, cache)
            return MoeModelOutputWithPast(last_hidden_state=hidden.view(x.shape))

    return Model


class Head(Keeping, nn.Linear):
    """The output head; logits are in fp32."""

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x [..., D], returns [..., V]"""
        packed: Packed = self.kept(lambda head: pack_plain(head.weight))
        return packed(x, out_dtype=torch.float32)


def use_invariant(model: Any) -> None:
    """Make a causal language model, already built by the host, compute as the engines do."""
    host: Any = type(model.model)
    model.model.__class__ = invariant(host)
    model.lm_head.__class__ = Head
    model._keep_in_fp32_modules_strict = {*IN_FP32}
