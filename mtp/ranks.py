"""The tensor-parallel ranks of a model, as drafting needs them."""

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """Both engines' group coordinators fit."""

    world_size: int

    def all_gather(self, input_: Tensor, dim: int) -> Tensor:
        """Concatenate each rank's tensor along `dim`."""

    def broadcast(self, input_: Tensor, src: int) -> Tensor:
        """Give all ranks the tensor of one."""
