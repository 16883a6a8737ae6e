"""Rings of state pages by themselves, with canaries around every slot."""

import torch
from torch import Tensor

CANARY = 0x7F


class Rings:
    """Slots of one ring [slots, ring, *shape] with gaps between them, and their spans."""

    def __init__(self, slots: int, ring: int, *shape: int, dtype: torch.dtype):
        size = ring * torch.Size(shape).numel() * dtype.itemsize
        self.raw = torch.full((slots, size + 64), CANARY, dtype=torch.uint8)
        self.rings = self.raw[:, :size].view(dtype).unflatten(1, (ring, *shape))
        self.span = torch.full((slots, 2), -1, dtype=torch.int32)

    def set_span(self, slot: int, start: int, end: int) -> None:
        self.span[slot] = torch.tensor([start, end], dtype=torch.int32)

    def untouched(self) -> list[int]:
        """The slots of which no byte was written."""
        return [i for i, slot in enumerate(self.raw) if (slot == CANARY).all()]

    def of(self, slot: int, positions: range) -> Tensor:
        """What the slot keeps of these positions."""
        return self.rings[slot, [p % self.rings.shape[1] for p in positions]]
