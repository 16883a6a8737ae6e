"""What a kind of model has that the family has not: each is of an extra."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.config.kinds import modules

Shapes = dict[str, tuple[int, ...]]  # of tensors, by name
Parts = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]  # of a page: name, shape, dtype


class Frame(NamedTuple):
    """The tensors around a model's attention and experts."""

    residual: Shapes  # of every layer, by the name in it
    end: Shapes  # what makes the last layer's residual the hidden state that the head reads
    mtp_input: Shapes  # what makes the MTP layer's input
    attention: Shapes  # of a full-attention layer, beside the family's
    layers: Mapping[int, Shapes]  # of some layers of the trunk, beside all that


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelKind:
    """A kind of model, by the class of its config, which its functions take."""

    config: type[Qwen3NextConfig]
    frame: Callable[[Any], Frame]
    unread: re.Pattern[str]  # tensors of its checkpoints that are no parameters
    # What other layers keep in the page of a linear layer, for so many drafts, in this dtype.
    page_parts: Callable[[Any, int, torch.dtype], Parts]
    keeps: str  # what that is
    sizes: Callable[[Any], str]  # that its kernels' cases depend on
    cases: Callable[[Any, str], dict[str, Any]]  # of the self-check; as `cases` there
    # Has its own weights packed: of a model, with its formats, by an engine's class of methods.
    use_packing: Callable[..., None]


@cache
def model_kinds() -> tuple[ModelKind, ...]:
    """Those of all extras."""
    return tuple(module.KIND for module in modules("kind"))


def kind_of(config: Qwen3NextConfig) -> ModelKind | None:
    """The kind of a model that is not of the family."""
    return next((kind for kind in model_kinds() if isinstance(config, kind.config)), None)
