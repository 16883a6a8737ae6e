"""Layers with packed weights: engines load and shard their parameters, our kernels multiply.

An engine's method of such a layer is one of these classes and the engine's own base class. Both
engines call `create_weights` with the same arguments.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwen3next_plugin import env
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.kernels.fused_moe import fused_moe
from qwen3next_plugin.kernels.linear import PackedWeight, cut
from qwen3next_plugin.kernels.linear.packed_weight import PANEL
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.quantisation.format import Format, InPanels
from qwen3next_plugin.model.quantisation.modules import without_wrapper
from qwen3next_plugin.model.quantisation.packing import (
    Packed,
    Packing,
    PackingExperts,
    drop_plain,
    pack_parameters,
    pack_plain,
)
from qwen3next_plugin.model.quantisation.stacked import HEAD_MODULE


class Ranks(NamedTuple):
    """This tensor-parallel rank, and how many there are."""

    rank: int
    size: int

    def share(self, total: int, of_rank: int) -> tuple[int, int]:
        """This rank's range of `of_rank`; ranks share ranges if there are fewer than ranks."""
        start = self.rank * (total // of_rank) // self.size * of_rank
        return start, start + of_rank


class Attaching(ABC):
    """Marks a method whose weights may be packed in the files; its layer may lack parameters."""

    module: str  # our name of the layer

    @abstractmethod
    def attach(self, layer: Any, name: str, weight: PackedWeight, ranks: Ranks) -> None:
        """Give the layer its rank's part of the weight of this name."""


class PlainMethod(Packing):
    """Packs a weight that the files have not quantised: in bf16, or as int8 if asked."""

    def __init__(self, *, as_int8: bool) -> None:
        super().__init__()
        self.as_int8 = as_int8

    def process_weights_after_loading(self, layer: Any) -> None:
        if layer.weight.numel():  # also where an engine has loaded it again
            layer.packed = pack_plain(layer.weight.data, as_int8=self.as_int8)
            drop_plain(layer)


class LinearMethod(Packing, Attaching):
    """The method of the projection `module`, in one format."""

    def __init__(self, module: str, form: Format) -> None:
        self.module, self.format = module, form
        self.channels: list[int] = []  # on this rank, by part
        self.columns = 0

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer parameters, with the attributes that the engine's loader reads."""
        columns = input_size_per_partition
        check_split(self.module, self.format, input_size, columns)
        self.channels, self.columns = output_partition_sizes, columns
        if isinstance(self.format, InPanels):
            return
        for name, parameter in _parameters(self.format, sum(output_partition_sizes), columns):
            by_column = {"input_dim": 1} if self.format.by_column(name) else {}
            dims = {"output_dim": 0} | by_column
            _register(layer, name, parameter, dims | extra_weight_attrs)

    def attach(self, layer: Any, name: str, weight: PackedWeight, ranks: Ranks) -> None:
        assert isinstance(self.format, InPanels)
        channels, before = [], 0
        for part, of_rank in zip(self.format.parts, self.channels, strict=True):
            start, stop = ranks.share(part, of_rank)
            channels.append((before + start, before + stop))
            before += part
        columns = ranks.share(weight.shape[-1], self.columns)
        hold(layer, "packed", cut(weight, channels, columns))

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "weight"):
            layer.packed = pack_parameters(layer, self.format)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.packed(x, bias)


class ExpertsMethod(PackingExperts, Attaching):
    """The method of a layer's experts; `w13` and `w2` have one format each."""

    def __init__(self, module: str, formats: Mapping[str, Format], inner: int) -> None:
        """Args: inner: features between the experts' two products, on all ranks together."""
        self.module, self.formats, self.inner = module, formats, inner
        self.width = inner  # on one rank

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Give the layer parameters, with the attributes that the engine's loader reads."""
        D, width = hidden_size, intermediate_size_per_partition
        check_experts(self.module, self.formats["w2"], self.inner, width)
        self.width = width
        for which, (channels, columns) in {"w13": (2 * width, D), "w2": (D, width)}.items():
            form = self.formats[which]
            if isinstance(form, InPanels):
                check_all_experts(self.module, form, num_experts)
                continue
            for name, parameter in _parameters(form, channels, columns, num_experts):
                by_group = form.group and form.by_column(name)
                scales = {"quant_method": "group" if by_group else "channel"}
                _register(layer, f"{which}_{name}", parameter, extra_weight_attrs | scales)

    def attach(self, layer: Any, name: str, weight: PackedWeight, ranks: Ranks) -> None:
        start, stop = ranks.share(self.inner, self.width)
        _, N, K = weight.shape
        if which := name.endswith(".w13"):
            part = cut(weight, [(start, stop), (self.inner + start, self.inner + stop)], (0, K))
        else:
            part = cut(weight, [(0, N)], (start, stop))
        hold(layer, "w13_packed" if which else "w2_packed", part)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "w2_weight"):
            self.pack_experts(layer)

    @staticmethod
    def multiply(layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """Shapes: x [T, D], topk_* [T, k], returns [T, D]."""
        return fused_moe(
            x=x,
            w13=layer.w13_packed.weight,
            w2=layer.w2_packed.weight,
            topk_weights=topk_weights.float(),
            topk_ids=topk_ids.int(),
        )


class HeadMethod(Attaching):
    """The method of the output head, whose channels an engine pads and shards."""

    module = HEAD_MODULE

    def attach(self, layer: Any, name: str, weight: PackedWeight, ranks: Ranks) -> None:
        first = layer.shard_indices.org_vocab_start_index
        channels = (first, first + layer.num_embeddings_per_partition)
        hold(layer, "packed", cut(weight, [channels], (0, weight.shape[-1])))


def hold(layer: Any, name: str, part: PackedWeight) -> None:
    """Give a layer its rank's part of a weight, copied where it is a view of a larger tensor.

    Raises: CheckpointError if the layer has one already.
    """
    if getattr(layer, name, None) is not None:
        raise CheckpointError("a packed checkpoint is loaded once: restart the server")
    if not env.mmap():
        zero = None if part.zero is None else _own(part.zero)
        part = replace(part, packed=_own(part.packed), scale=_own(part.scale), zero=zero)
    setattr(layer, name, Packed(part))


def _own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of another one."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def attacher(model: nn.Module, ranks: Ranks) -> Callable[[str, PackedWeight], None]:
    """Gives packed weights, by their names, to the layers of a model."""
    layers: dict[str, Any] = {}
    for layer in model.modules():
        if isinstance(method := getattr(layer, "quant_method", None), Attaching):
            layers[without_wrapper(method.module)] = layer

    def attach(name: str, weight: PackedWeight) -> None:
        layer = layers.get(name) or layers[name.rpartition(".")[0]]  # of experts
        layer.quant_method.attach(layer, name, weight, ranks)

    return attach


def each_layer(model: nn.Module, drafting: nn.Module | None) -> Iterator[tuple[Any, bool]]:
    """Every module of a model, and whether its weights in bf16 are packed as int8.

    Those in `drafting` are, except routers: drafting is bound by reading weights, and a wrong draft
    costs only speed.
    """
    within = set() if drafting is None else set(drafting.modules())
    for name, module in model.named_modules():
        yield module, module in within and not name.endswith(".gate")


def check_split(module: str, form: Format, columns: int, of_rank: int) -> None:
    """Refuse ranks that would share a group of columns.

    Raises: ConfigError, naming the module and the fix.
    """
    if form.group and columns != of_rank and of_rank % form.group:
        raise ConfigError(
            f"{module}: a rank's {of_rank} of {columns} columns are no multiple of {form.group}, "
            f"which share a scale; use fewer tensor-parallel ranks"
        )


def check_experts(module: str, form: Format, inner: int, of_rank: int) -> None:
    """Refuse experts [D, I] that the kernel cannot take, of a rank or of all.

    Raises: ConfigError, naming the module and the fix.
    """
    check_split(module, form, inner, of_rank)
    if of_rank % PANEL:
        raise ConfigError(
            f"{module}: packed experts have {of_rank} inner features on a rank, no multiple of "
            f"{PANEL}; use fewer tensor-parallel ranks, or a checkpoint that is not quantised"
        )


def check_all_experts(module: str, form: InPanels, of_rank: int) -> None:
    """Refuse ranks that would have some of the experts. Raises: ConfigError with the fix."""
    if of_rank != form.shape[0]:
        raise ConfigError(
            f"{module}: {of_rank} of {form.shape[0]} experts on a rank; the experts of a packed "
            f"checkpoint stay together: serve it without expert parallelism"
        )


def _parameters(
    form: Format, channels: int, columns: int, *experts: int
) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters into which an engine loads a weight [N, K], or experts [E, N, K]."""
    for name, (shape, dtype) in form.tensors(channels, columns).items():
        empty = torch.empty(*experts, *shape, dtype=dtype)
        yield name, nn.Parameter(empty, requires_grad=False)


def _register(
    layer: nn.Module, name: str, parameter: nn.Parameter, attributes: Mapping[str, Any]
) -> None:
    for attribute, value in attributes.items():
        setattr(parameter, attribute, value)
    layer.register_parameter(name, parameter)
