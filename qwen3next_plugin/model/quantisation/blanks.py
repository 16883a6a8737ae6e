"""Restores the parameters that packing drops, so that a model can be loaded again."""

from typing import Any

import torch
from torch import nn

PACKED, PACKED_EXPERTS = "packed", ("w13_packed", "w2_packed")  # what packing leaves in their place


class Blanks:
    """A model's parameters as they are before it is loaded, without data."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            (layer, {name: _like(p, "meta") for name, p in layer.named_parameters(recurse=False)})
            for layer in model.modules()
        ]

    def restore(self) -> None:
        """Drop what is packed, and put empty parameters in its place; others stay as they are."""
        layer: Any
        for layer, blanks in self._layers:
            if PACKED in layer._modules:
                layer.packed = None
            for name in PACKED_EXPERTS:
                layer._modules.pop(name, None)
            for name, blank in blanks.items():
                present = getattr(layer, name, None)
                if not _alike(present, blank):
                    setattr(layer, name, _like(blank, "cpu"))


def _alike(present: nn.Parameter | None, blank: nn.Parameter) -> bool:
    return present is not None and (present.shape, present.dtype) == (blank.shape, blank.dtype)


def _like(parameter: nn.Parameter, device: str) -> nn.Parameter:
    """An empty parameter with the same attributes, which engines use to load it."""
    empty = torch.empty_like(parameter, device=device)
    found = nn.Parameter(empty, requires_grad=False)
    found.__class__ = parameter.__class__
    found.__dict__.update(parameter.__dict__)
    return found
