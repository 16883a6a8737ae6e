"""Reads a checkpoint's tensors as our parameters, and refuses what does not belong there."""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from qwen3next_plugin.config import Layout, Qwen3NextConfig
from qwen3next_plugin.kernels.linear.packed_weight import PackedWeight
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.errors import MIXED, CheckpointError
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.layouts import Shapes, group_projections, our_name, our_names
from qwen3next_plugin.model.checkpoint.mapped import giving_back
from qwen3next_plugin.model.checkpoint.tensors import MTP, mtp_tensors, trunk_tensors
from qwen3next_plugin.model.quantisation.modules import Formats, Stream

# Tensors that a quantised checkpoint may have in addition to a weight: its scales, zero points.
QUANTISATION_SUFFIXES = (
    *("_scale", "_scale_inv", "_scale_2", "scales", "qzeros", "g_idx", "qweight"),
    *("weight_packed", "weight_shape", "weight_zero_point"),
)
EXPERT_MODULE = re.compile(r"(model|mtp)\.layers\.\d+\.mlp\.experts\.\d+(?=\.)")
LAYER = re.compile(r"(model|mtp)\.layers\.\d+(?=\.)")
SCALE_SUFFIXES = (".weight_scale", "_weight_scale", ".weight_scale_inv", "_weight_scale_inv")


class Parts(Protocol):
    """Called, with its name, when a layer or expert begins and ends loading."""

    def begin(self, name: str, /) -> None:
        """Called before its first tensor."""

    def end(self, name: str, /) -> None:
        """Called once all its tensors are loaded."""


def parameters(
    stored: Iterable[tuple[str, torch.Tensor]],
    config: Qwen3NextConfig,
    *,
    expected: Shapes,
    ignored: Iterable[str] = (),
    quantised: bool = False,
    formats: Formats | None = None,
    layout: Layout = "grouped",
    parts: Parts | None = None,
    attach: Callable[[str, PackedWeight], None] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors by our parameters' names, with channels in their order.

    Converts a flat checkpoint, unless `layout`, that of our parameters, is flat too.

    Args:
        quantised: the tensors stay as the checkpoint has them, for a host's kernels.
        formats: the tensors become these formats, for our kernels.
        parts: called before the first and after the last tensor of a layer or expert.
        attach: called with a weight's name and value if the files have packed it.

    Raises:
        CheckpointError: as `checked`, or a quantised tensor that cannot be converted.
    """
    named = _counted(our_names(stored, config), expected, formats)
    if formats is not None:
        named, expected = formats.converted(named, ignored), formats.expected(expected)
        quantised = False  # any more
    else:
        named = _read_once(named)
    tensors = checked(named, expected=expected, ignored=ignored, quantised=quantised)
    if parts is not None and not quantised:
        tensors = _by_part(tensors, expected, parts)
    if attach is not None and formats is not None:
        tensors = formats.attached(tensors, attach)
    return group_projections(tensors, config) if layout == "grouped" else tensors


def checked(
    stored: Iterable[tuple[str, torch.Tensor]],
    *,
    expected: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    quantised: bool = False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the expected tensors; refuse one that is unexpected, misshapen or missing.

    Args:
        stored: the tensors that the host reads from the checkpoint.
        expected: name to shape of every tensor that must be there.
        ignored: names that may be there and are skipped: the other model's part of the checkpoint.
        quantised: check names only, because packed tensors have other shapes, and allow scales.

    Raises:
        CheckpointError: naming the tensor, and what to do.
    """
    ignored, seen = frozenset(ignored), set()
    for name, tensor in stored:
        companion = quantised and name.endswith(QUANTISATION_SUFFIXES)
        weight = name.rsplit(".", 1)[0] + ".weight" if companion else name
        if weight in ignored:
            continue
        if weight not in expected:
            raise CheckpointError(
                f"unexpected tensor {name} {tuple(tensor.shape)}: the config has no place for it; "
                f"{MIXED}"
            )
        if not quantised and tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(tensor.shape)}, the config asks for "
                f"{expected[name]}: {MIXED}"
            )
        seen.add(weight)
        yield name, tensor
    if missing := sorted(expected.keys() - seen):
        raise CheckpointError(
            f"{len(missing)} tensors are missing, the first is {missing[0]}: the checkpoint is "
            f"incomplete; download it again, or check model.safetensors.index.json"
        )


def _counted(
    tensors: Stream, expected: Iterable[str], formats: Formats | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors; count the bytes of the expected part, trunk or MTP layer, for the bar."""
    of_mtp = any(name.startswith(MTP) for name in expected)
    whose = "MTP layer: " if of_mtp else ""
    progress.describe(whose + (formats.doing if formats else "loading weights"))
    for name, tensor in tensors:
        nbytes = tensor.nbytes if name.startswith(MTP) == of_mtp else 0
        yield name, tensor
        progress.advance(nbytes)
    progress.describe(whose + "packing")


def _read_once(tensors: Stream) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors that are copied before the next one is asked for."""
    with giving_back() as done:
        for name, tensor in tensors:
            yield name, tensor
            done(tensor)


def _by_part(
    tensors: Stream, expected: Iterable[str], parts: Parts
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors; call `parts` when an expert or a layer begins, and when it is loaded.

    A tensor counts as loaded when the next one is asked for.

    Raises: CheckpointError for a tensor that comes twice: its layer may be packed by then.
    """
    left: dict[str, set[str]] = defaultdict(set)
    for name in expected:
        for part in _parts_of(name):
            left[part].add(name)
    begun = set[str]()
    for name, tensor in tensors:
        having = _parts_of(name)
        if any(name not in left[part] for part in having):
            raise CheckpointError(f"tensor {name} is in two files: {MIXED}")
        for part in having:
            if part not in begun:
                begun.add(part)
                parts.begin(part)
        yield name, tensor
        for part in having:
            left[part].remove(name)
            if not left[part]:
                parts.end(part)


def _parts_of(name: str) -> list[str]:
    """The expert and the layer that a tensor belongs to."""
    return [found[0] for part in (EXPERT_MODULE, LAYER) if (found := part.match(name))]


def check_scales(parameters: Iterable[str], loaded: Iterable[str]) -> None:
    """Refuse unquantised weights in a layer that is built for quantised ones.

    Raises:
        CheckpointError: naming a missing scale, and what to do.
    """
    scales = {name for name in parameters if name.endswith(SCALE_SUFFIXES)}
    if missing := sorted(scales.difference(loaded)):
        raise CheckpointError(
            f"{len(missing)} scales are missing, the first is {missing[0]}: the checkpoint has "
            f"these layers unquantised; name them in modules_to_not_convert of the config's "
            f"quantization_config"
        )


def require_mtp(
    stored: Iterable[tuple[str, torch.Tensor]], config: Qwen3NextConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors unchanged, and refuse a checkpoint without any `mtp.*` tensor.

    Raises:
        CheckpointError: after the last tensor, if none was an MTP tensor.
    """
    found = False
    for name, tensor in stored:
        found = found or (our_name(name, config) or "").startswith(MTP)
        yield name, tensor
    if not found:
        raise CheckpointError(
            "MTP was asked for and the checkpoint has no mtp.* tensors (a save through "
            "transformers drops them): serve without --speculative-config (SGLang: "
            "--speculative-algorithm), or use the released checkpoint"
        )


def check_stored(
    folder: Path,
    config: Qwen3NextConfig,
    *,
    quantised: bool,
    formats: Formats | None,
    with_mtp: bool,
) -> None:
    """Check a local checkpoint by its files' headers, before anything is loaded.

    Args: as of `check_tensors`.

    Raises:
        CheckpointError: a damaged file, or a tensor missing, unexpected or of another shape.
    """
    stored = list(stored_tensors(folder))
    check_tensors(stored, config, quantised=quantised, formats=formats, with_mtp=with_mtp)


def check_tensors(
    stored: Sequence[tuple[str, torch.Tensor]],
    config: Qwen3NextConfig,
    *,
    quantised: bool,
    formats: Formats | None,
    with_mtp: bool,
) -> None:
    """Check a checkpoint's tensors, of which only name, shape and dtype are read.

    Args:
        quantised, formats: see `parameters`.
        with_mtp: check the MTP tensors too, which are ignored otherwise.

    Raises:
        CheckpointError: a tensor missing, unexpected or of another shape.
    """
    headers = [(name, tensor.to("meta")) for name, tensor in stored]
    trunk, mtp = trunk_tensors(config), mtp_tensors(config)
    parts: list[tuple[Stream, Shapes, Shapes]] = [(headers, trunk, mtp)]
    if with_mtp:
        parts.append((require_mtp(headers, config), mtp, trunk))
    for given, expected, ignored in parts:
        tensors = parameters(
            given,
            config,
            expected=expected,
            ignored=ignored,
            quantised=quantised,
            formats=formats,
        )
        deque(tensors, maxlen=0)
