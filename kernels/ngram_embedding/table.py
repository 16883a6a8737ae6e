"""The table of n-gram embeddings: rows in memory, or in the mapped files of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

SCALED = (torch.float8_e4m3fn, torch.int8)
STORED = (torch.bfloat16, torch.float16, torch.float32, *SCALED)


@dataclass(frozen=True, slots=True, eq=False)
class NgramTable:
    """Rows [rows, d] in the dtype of the files, in shards that follow each other; made by `of`.

    Shapes:
        shards: [shard_rows, d] each, the last may have fewer rows
        addresses: [shards] int64, where each begins, for the native kernel
        scale: fp32, of FP8 and int8: [1], or one for each row [rows]
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    shards: tuple[Tensor, ...]
    shard_rows: int
    addresses: Tensor
    scale: Tensor | None
    mapped: bool  # its memory is that of files: read ahead, before a kernel waits for it

    @classmethod
    def of(cls, shards: Sequence[Tensor], *, scale: Tensor | None = None, mapped: bool) -> Self:
        """Raises: ValueError unless the shards are alike, and a scale is where one is needed."""
        shard_rows, d = shards[0].shape
        dtype, rows = shards[0].dtype, sum(map(len, shards))
        for i, shard in enumerate(shards):
            whole = len(shard) == shard_rows or (i == len(shards) - 1 and len(shard) < shard_rows)
            alike = shard.dtype == dtype and shard.shape[1:] == (d,) and shard.is_contiguous()
            if not (whole and alike and shard.device.type == "cpu"):
                raise ValueError(
                    f"shard {i} of an n-gram table is {shard.dtype} {tuple(shard.shape)} on"
                    f" {shard.device}, strides {shard.stride()}, beside {dtype} {(shard_rows, d)}"
                )
        if dtype not in STORED or (scale is None) != (dtype not in SCALED):
            raise ValueError(f"an n-gram table is {dtype}, with scale {scale}")
        shapes = ((1,), (rows,))
        if scale is not None and not (
            (scale.dtype == torch.float32 and scale.shape in shapes)
            and (scale.is_contiguous() and scale.device.type == "cpu")
        ):
            raise ValueError(f"an n-gram table's scale is {scale.dtype} {tuple(scale.shape)}")
        addresses = torch.tensor([shard.data_ptr() for shard in shards])
        return cls((rows, d), dtype, tuple(shards), shard_rows, addresses, scale, mapped)

    def take(self, rows: Tensor) -> Tensor:
        """Some rows in fp32. Shapes: rows [n] int64, returns [n, d]"""
        places = [divmod(row, self.shard_rows) for row in rows.tolist()]
        values = torch.stack([self.shards[shard][row].float() for shard, row in places])
        if self.scale is None:
            return values
        return values * (self.scale if len(self.scale) == 1 else self.scale[rows, None])
