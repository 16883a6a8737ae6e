"""Per-layer embeddings: what a token's last n-grams add to the streams before a linear layer.

An engine calls `add` with the pages of the linear layer and the step.
"""

from collections.abc import Mapping, Set
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from qwen3next_plugin import env
from qwen3next_plugin.extras.qwen4_exp.config import Qwen4ExpConfig
from qwen3next_plugin.extras.qwen4_exp.ngrams import hashing
from qwen3next_plugin.extras.qwen4_exp.tensors import scale_name, table_names
from qwen3next_plugin.kernels.dilated_conv1d import dilated_conv1d
from qwen3next_plugin.kernels.ngram_embedding import NgramTable, ngram_embedding
from qwen3next_plugin.kernels.ple_gate import PLENorms, ple_gate
from qwen3next_plugin.kernels.step import Step
from qwen3next_plugin.model.checkpoint import contents
from qwen3next_plugin.model.checkpoint.errors import MIXED, CheckpointError
from qwen3next_plugin.model.checkpoint.headers import (
    Index,
    Place,
    read_index,
    read_places,
    weight_files,
)
from qwen3next_plugin.model.checkpoint.layouts import without_prefix
from qwen3next_plugin.model.checkpoint.mapped import read_at_random
from qwen3next_plugin.model.host_layers import HostLayers
from qwen3next_plugin.model.kinds import Parts
from qwen3next_plugin.model.linear_attention import Weight

PLAIN_DTYPES = ("BF16", "F16", "F32")  # as safetensors names them
FP8 = "F8_E4M3"


class NgramPool(NamedTuple):
    """What a layer's n-gram embedding keeps in its pages; dim 0 is the slot. See docs/state.md.

    Shapes:
        tokens [slots, n + num_drafts] int32     the last tokens; position p is at p % the length
        conv   [slots, reach + 1 + num_drafts, hc·D]   what the convolution reads, the same
        span   [slots, 2] int32                  that of the page, which the delta rule advances
    """

    tokens: Tensor
    conv: Tensor
    span: Tensor

    @classmethod
    def of(cls, parts: Mapping[str, Tensor]) -> Self:
        """Of the parts of the pages, by name."""
        return cls(parts["tokens"], parts["ngram_conv"], parts["span"])


def page_parts(config: Qwen4ExpConfig, num_drafts: int, dtype: torch.dtype) -> Parts:
    """The parts of a page that are not the linear layer's."""
    if not config.ple_layer_ids:
        return ()
    wide = config.hc_count * config.hidden_size
    return (
        ("tokens", (config.ngram_size + num_drafts,), torch.int32),
        ("ngram_conv", (config.ple_conv_reach + 1 + num_drafts, wide), dtype),
    )


class PerLayerEmbedding(nn.Module):
    """The n-gram embedding of layer `i`; every rank has all of it."""

    def __init__(
        self,
        config: Qwen4ExpConfig,
        layers: HostLayers,
        prefix: str,
        *,
        i: int,
        table: NgramTable,
    ) -> None:
        super().__init__()
        D, self.hc_count, E = config.hidden_size, config.hc_count, config.ple_embed_dim
        wide = self.hc_count * D
        self.eps, self.dilation = config.rms_norm_eps, config.ngram_size
        self.hashing, self.table = hashing(config, i), table
        self.key_proj = layers.replicated(E, wide, bias=False, prefix=f"{prefix}.key_proj")
        self.value_proj = layers.replicated(E, D, bias=False, prefix=f"{prefix}.value_proj")
        self.norm_key = Weight(wide)
        self.norm_query = Weight(wide)
        self.norm_conv = Weight(wide)
        self.conv1d = Weight(wide, 1, config.ple_conv_kernel_size)

    def add(
        self,
        streams_: torch.Tensor,
        block: torch.Tensor | None,
        injection: torch.Tensor | None,
        token_ids: torch.Tensor,
        *,
        pool_: NgramPool,
        step: Step,
    ) -> None:
        """Inject the last block's output into the streams, then the n-grams' embeddings.

        Shapes:
            streams_ [T, hc, D], block [T, D], injection [T, hc], token_ids [T]

        Raises:
            RuntimeError: a row's page cannot continue at its context length.
        """
        embeds = ngram_embedding(
            token_ids=token_ids,
            table=self.table,
            hashing=self.hashing,
            tokens_=pool_.tokens,
            span=pool_.span,
            step=step,
            out_dtype=streams_.dtype,
        )
        keys, _ = self.key_proj(embeds)
        values, _ = self.value_proj(embeds)
        norms = PLENorms(self.norm_query.weight, self.norm_key.weight, self.norm_conv.weight)
        gated, normed = ple_gate(
            streams_=streams_,
            keys=keys,
            values=values,
            norms=norms,
            eps=self.eps,
            block=block,
            injection=injection,
        )
        around = dilated_conv1d(
            x=normed,
            weight=self.conv1d.weight.squeeze(1),
            dilation=self.dilation,
            conv_=pool_.conv,
            span=pool_.span,
            step=step,
        )
        streams_ += (gated + around).view(streams_.shape)


def open_table(folder: Path, config: Qwen4ExpConfig, i: int) -> NgramTable:
    """The table of layer `i` in a checkpoint's files, or in memory if QWEN3NEXT_NGRAM says so.

    Raises:
        CheckpointError: a part of it, or its scale, is missing, or of another dtype or shape.
    """
    names, scale_of = table_names(config, i), scale_name(i)
    places = _places(folder, config, {*names, scale_of})
    if missing := [name for name in names if name not in places]:
        raise CheckpointError(
            f"{folder}: {missing[0]} is missing: the checkpoint is incomplete; download it again"
        )
    found = [places[name] for name in names]
    if (dtype := found[0].header.dtype) not in (*PLAIN_DTYPES, FP8):
        raise CheckpointError(
            f"{folder}: {names[0]} is {dtype}: tables of n-grams are read in bfloat16, float16, "
            f"float32 or float8_e4m3fn; use the checkpoint of one of these"
        )
    scale = _scale(places.get(scale_of), f"{folder}: {scale_of}", is_fp8=dtype == FP8)
    if env.ngram() == "resident":
        return NgramTable.of([contents.read(place) for place in found], scale=scale, mapped=False)
    shards = [contents.mapped(place) for place in found]
    for shard in shards:
        read_at_random(shard)
    return NgramTable.of(shards, scale=scale, mapped=True)


def _scale(place: Place | None, name: str, *, is_fp8: bool) -> Tensor | None:
    """The one scale of a table in FP8, in fp32. Shapes: returns [1]"""
    if not is_fp8:
        if place is None:
            return None
        raise CheckpointError(f"{name} is there, and the table is not in FP8: {MIXED}")
    if place is None:
        raise CheckpointError(
            f"{name} is missing, and the table is in FP8: the checkpoint is incomplete; download "
            f"it again"
        )
    dtype, shape = place.header.dtype, tuple(place.header.shape)
    if dtype not in PLAIN_DTYPES or shape != (1,):
        raise CheckpointError(f"{name} is {dtype} {shape}, not one number in a float: {MIXED}")
    scale = contents.read(place).float()
    if not (scale.isfinite() & (scale > 0)).all():
        raise CheckpointError(f"{name} is {scale.item()}, not a positive number: download it again")
    return scale


def _places(folder: Path, config: Qwen4ExpConfig, names: Set[str]) -> dict[str, Place]:
    """Where these tensors are, by our names; reads only the files that have them."""
    index, found = read_index(folder), {}
    if index is not None:
        files = {t: f for t, f in index.files.items() if without_prefix(t, config) in names}
        index = Index(files, None)
    for path in weight_files(folder, index):
        for name, place in read_places(path)[1].items():
            ours = without_prefix(name, config)
            if ours is not None and ours in names:
                found[ours] = place
    return found
