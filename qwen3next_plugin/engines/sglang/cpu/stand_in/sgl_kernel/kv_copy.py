"""Moves slots of the KV cache, in all layers at once."""

import ctypes

import torch
from torch import Tensor

from sgl_kernel.operators import operator


# Declared to write the pointers, because a graph may drop an operator that writes nothing; what it
# writes is the memory behind them.
@operator("data_ptrs")
def copy_all_layer_kv_cache_cpu(
    data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor
) -> None:
    """cache[tgt_loc] = cache[src_loc] in each layer's key and value cache.

    All sources are read before a target is written, so the two may overlap.

    Shapes:
        data_ptrs: [L] uint64, addresses; strides: [L], bytes from one slot to the next
        tgt_loc, src_loc: [M], slots

    Raises: IndexError: a negative slot. The size of the caches is not known here; SGLang checks it.
    """
    if not src_loc.numel():
        return
    low, high = torch.cat([tgt_loc, src_loc]).aminmax()
    if low < 0:
        raise IndexError(f"copy_all_layer_kv_cache_cpu: slot {int(low)} is negative")
    source, target = src_loc.long(), tgt_loc.long()
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = _rows(address, int(high) + 1, row_bytes)
        rows.index_copy_(0, target, rows.index_select(0, source))


def _rows(address: int, rows: int, row_bytes: int) -> Tensor:
    """The memory at `address` as [slots, slot_bytes] uint8, up to the last slot used."""
    memory = (ctypes.c_uint8 * (rows * row_bytes)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.uint8).view(rows, row_bytes)
