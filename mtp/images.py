"""Positions of images in prompts, which have three axes, for the MTP layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Axes(NamedTuple):
    """Positions in time, height and width of a request with images.

    Shapes: of_prompt [3, prompt]
    """

    of_prompt: torch.Tensor
    delta: int  # after the prompt: a token's position on each axis, minus that in the sequence


def mrope_positions(
    requests: Sequence[Axes | None], positions: torch.Tensor, counts: Sequence[int]
) -> torch.Tensor | None:
    """Positions on three axes of `counts` tokens of each request; None if no request has images.

    Shapes: requests, counts [N], positions [sum(counts)] in the sequence,
        returns [3, sum(counts)]
    """
    if all(axes is None for axes in requests):
        return None
    parts = zip(requests, positions.split(list(counts)), strict=True)
    return torch.cat([_of_request(*part) for part in parts], dim=1)


def _of_request(axes: Axes | None, positions: torch.Tensor) -> torch.Tensor:
    if axes is None:
        return positions.expand(3, -1)
    prompt = axes.of_prompt.shape[1]
    in_prompt = axes.of_prompt[:, positions.clamp(max=prompt - 1)]
    return torch.where(positions < prompt, in_prompt, positions + axes.delta)
