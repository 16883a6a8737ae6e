"""The layout of a state page (one layer, one request), and its size in bytes.

Engines allocate and copy pages as bytes; kernels see a page's parts as a `StatePool`.
"""

import re
from dataclasses import dataclass
from math import prod
from typing import Self

import torch

from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.config.sizes import CONV_WIDTH
from qwen3next_plugin.kernels.pages import StatePool
from qwen3next_plugin.kernels.step import GRID
from qwen3next_plugin.model.kinds import Parts, kind_of

PAGE_FORMAT = 2  # one more whenever the bytes of a page are read another way
STATE_DTYPES = ("float32", "bfloat16")  # of S; both hosts accept more


def state_dtype(name: str, *, setting: str, flag: str) -> torch.dtype:
    """The dtype of S that a host's setting asks for; raises ConfigError, which names the flag."""
    if name not in STATE_DTYPES:
        raise ConfigError(
            f"{setting} = {name!r}: the state is kept in one of {', '.join(STATE_DTYPES)}; "
            f"leave {flag} out for float32"
        )
    return getattr(torch, name)


class StateError(RuntimeError):
    """A step that a layer's pages cannot continue; `row` is the row in the kernel's error."""

    def __init__(self, layer: str, complaint: str) -> None:
        super().__init__(f"{layer}: {complaint}")
        named = re.match(r"row (\d+): ", complaint)
        self.row = int(named[1]) if named else None


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The layout of one self-describing page.

    A page is a flat run of bytes. A byte-for-byte copy is always correct, so the host may cache,
    offload and copy pages without knowing the layout.
    """

    num_key_heads: int  # H, of this rank
    num_value_heads: int  # HV, of this rank
    key_dim: int  # K
    value_dim: int  # V
    num_drafts: int  # at most so many tokens of a step are rolled back
    activation_dtype: torch.dtype
    state_dtype: torch.dtype
    shared: Parts = ()  # what another layer keeps in the page

    @classmethod
    def from_config(
        cls,
        config: Qwen3NextConfig,
        *,
        num_drafts: int,
        activation_dtype: torch.dtype,
        state_dtype: torch.dtype,
        shared: bool = False,
    ) -> Self:
        """Args: shared: with what another layer keeps in the page, if the model has such layers."""
        kind = kind_of(config) if shared else None
        return cls(
            num_key_heads=config.linear_num_key_heads_per_rank,
            num_value_heads=config.linear_num_value_heads_per_rank,
            key_dim=config.linear_key_head_dim,
            value_dim=config.linear_value_head_dim,
            num_drafts=num_drafts,
            activation_dtype=activation_dtype,
            state_dtype=state_dtype,
            shared=kind.page_parts(config, num_drafts, activation_dtype) if kind else (),
        )

    def __post_init__(self) -> None:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"{self.num_value_heads} value heads cannot share {self.num_key_heads} key heads"
            )
        if self.num_drafts < 0:
            raise ValueError(f"a draft cannot have {self.num_drafts} tokens")

    @property
    def conv_dim(self) -> int:
        """C, the number of convolution channels: all of q, k and v."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each part, in a page's order: first those of 16·n bytes, for tiles."""
        H, HV = self.num_key_heads, self.num_value_heads
        K, V, W = self.key_dim, self.value_dim, GRID + self.num_drafts
        parts = {
            "state": ((HV, K, V), self.state_dtype),
            "key": ((W, H, K), torch.float32),
            "u": ((W, HV, V), torch.float32),
            "conv": ((CONV_WIDTH + self.num_drafts, self.conv_dim), self.activation_dtype),
            "g": ((W, HV), torch.float32),
            "span": ((2,), torch.int32),
        }
        return parts | {name: (shape, dtype) for name, shape, dtype in self.shared}

    def nbytes(self) -> dict[str, int]:
        """Bytes of each part of a page."""
        return {
            name: prod(shape) * dtype.itemsize for name, (shape, dtype) in self.tensors().items()
        }

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, before the host rounds it up to its own page size."""
        return sum(self.nbytes().values())

    def spare_pool(self, device: torch.device) -> StatePool:
        """Two pages outside an engine's pool, aligned as hosts align theirs; unwritten."""
        page_bytes = -(-self.page_bytes // 256) * 256
        return self.view(torch.empty(2, page_bytes, dtype=torch.int8, device=device))

    def view(self, pages: torch.Tensor) -> StatePool:
        """View raw pages as the tensors they hold.

        Shapes:
            pages [slots, >= page_bytes] uint8 or int8, last dim contiguous
        """
        parts = self.view_parts(pages)
        return StatePool(**{name: parts[name] for name in StatePool._fields})

    def view_parts(self, pages: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every part of the pages, by name. Shapes: as of `view`."""
        views, offset = {}, 0
        nbytes = self.nbytes()
        for name, (shape, dtype) in self.tensors().items():
            part = pages[:, offset : offset + nbytes[name]].view(dtype)  # [slots, prod(shape)]
            views[name] = part.unflatten(1, shape)
            offset += nbytes[name]
        return views
