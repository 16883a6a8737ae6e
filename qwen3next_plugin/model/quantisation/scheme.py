"""A quantised module as a checkpoint has it; a scheme says how to read one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qwen3next_plugin.kernels.linear.packed_weight import GROUPS, SCALE_DTYPES
from qwen3next_plugin.model.checkpoint.errors import MIXED, CheckpointError
from qwen3next_plugin.model.quantisation.format import Format, Tensors


class Module(NamedTuple):
    """A quantised module of a checkpoint: its weight [N, K] and its tensors by their last name."""

    name: str
    channels: int
    columns: int
    tensors: Tensors
    less: int = 1  # GPTQ stores zero points less this; 0 in its second version

    def refuse(self, what: str, fix: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}; {fix}")

    def shape(self, tensor: str) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].shape)

    def check_weight(self) -> None:
        """Refuse values of another shape than the config's. Raises: CheckpointError."""
        expected = (self.channels, self.columns)
        if (shape := self.shape("weight")) != expected:
            raise self.refuse(f"weight has shape {shape}, the config asks for {expected}", MIXED)

    def check_shape(self, name: str, *served: tuple[int, ...]) -> None:
        """Refuse a tensor of another shape, if it is there. Raises: CheckpointError."""
        if name in self.tensors and (found := self.shape(name)) not in served:
            raise self.refuse(
                f"{name} has shape {found}, where {served[0]} fits", "download the checkpoint again"
            )

    def group(self, groups: int, scales: str) -> int:
        """Columns that share a scale, from the number of groups; 0: all."""
        if groups == 1:
            return 0
        if groups < 1 or self.columns % groups:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has {groups} groups for {self.columns} columns, "
                f"which they do not divide",
                "quantise with a group size that divides the columns",
            )
        if (group := self.columns // groups) not in GROUPS:
            raise self.refuse(
                f"{scales} {self.shape(scales)} has a scale for each {group} columns",
                f"quantise with groups of {', '.join(map(str, GROUPS))} columns or all of them",
            )
        return group


class Scheme(NamedTuple):
    """The tensors of a module that is quantised in one way, and how to read them."""

    needs: tuple[str, ...]
    may: tuple[str, ...]
    format: Callable[[Module], Format]  # by headers alone
    read: Callable[[Module], dict[str, Tensor]]  # in that format
    scales: tuple[torch.dtype, ...] = SCALE_DTYPES  # their dtypes
