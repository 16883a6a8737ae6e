"""The recurrent state: what one page (one layer, one request) holds, and in how many bytes."""

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from qwen3next_plugin.config import CONV_WIDTH


class StatePool(NamedTuple):
    """Views of every page of a layer; dim 0 is the slot.

    Shapes:
        state [slots, HV, V, K]   S, standing at absolute position p0
        key   [slots, W, H, K]    L2-normalised key of each window token (fp32)
        u     [slots, W, HV, V]   corrected value of each window token (fp32)
        decay [slots, W, HV]      exp(g) of each window token (fp32)
        span  [slots, 2]          p0 and w, the number of window tokens (int32)
        conv  [slots, 3+W, C]     convolution inputs from position p0-3 on, in [q; k; v] order
    """

    state: torch.Tensor
    key: torch.Tensor
    u: torch.Tensor
    decay: torch.Tensor
    span: torch.Tensor
    conv: torch.Tensor


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where everything lies in one self-describing page.

    A page is a flat run of bytes. A verbatim copy of it is always a correct copy, so the host may
    cache, offload and copy pages without knowing what is inside.
    """

    num_key_heads: int  # H, of this rank
    num_value_heads: int  # HV, of this rank
    key_dim: int  # K
    value_dim: int  # V
    window: int  # W: tokens the window holds, draft tokens + 1
    activation_dtype: torch.dtype
    state_dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"{self.num_value_heads} value heads cannot share {self.num_key_heads} key heads"
            )
        if self.window < 1:
            raise ValueError(f"a window holds at least one token, not {self.window}")

    @property
    def conv_dim(self) -> int:
        """C, the number of convolution channels: all of q, k and v."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part of a page, in the order they lie in it."""
        H, HV, K, V, W = (
            self.num_key_heads,
            self.num_value_heads,
            self.key_dim,
            self.value_dim,
            self.window,
        )
        return {
            "state": ((HV, V, K), self.state_dtype),
            "key": ((W, H, K), torch.float32),
            "u": ((W, HV, V), torch.float32),
            "decay": ((W, HV), torch.float32),
            "span": ((2,), torch.int32),
            "conv": ((CONV_WIDTH - 1 + W, self.conv_dim), self.activation_dtype),
        }

    def nbytes(self) -> dict[str, int]:
        """Bytes of each part of a page."""
        return {
            name: prod(shape) * dtype.itemsize for name, (shape, dtype) in self.tensors().items()
        }

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, before the host rounds it up to its own page size."""
        return sum(self.nbytes().values())

    def view(self, pages: torch.Tensor) -> StatePool:
        """View raw pages as the tensors they hold.

        Shapes:
            pages [slots, >= page_bytes] uint8 or int8, last dim contiguous
        """
        views, offset = {}, 0
        nbytes = self.nbytes()
        for name, (shape, dtype) in self.tensors().items():
            part = pages[:, offset : offset + nbytes[name]].view(dtype)  # [slots, prod(shape)]
            views[name] = part.unflatten(1, shape)
            offset += nbytes[name]
        return StatePool(**views)
