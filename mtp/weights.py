"""Weights: names and shapes of the MTP tensors in a checkpoint, and a check that they exist."""

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin import env
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.formats import Formats
from qwen3next_plugin.model.layouts import our_name
from qwen3next_plugin.model.weights import (
    CheckpointError,
    check_files,
    decoder_layer_tensors,
    formats_of,
    parameters,
    plain_modules_of,
    stored_tensors,
    trunk_tensors,
)

PREFIX = "mtp."


def mtp_tensors(config: Qwen3NextConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every MTP tensor. Embedding and lm_head are shared with the trunk."""
    D = config.hidden_size
    tensors = {
        "mtp.fc.weight": (D, 2 * D),
        "mtp.pre_fc_norm_embedding.weight": (D,),
        "mtp.pre_fc_norm_hidden.weight": (D,),
        "mtp.norm.weight": (D,),
    }
    for i in range(config.num_nextn_predict_layers):
        layer = decoder_layer_tensors(config, "full_attention", is_moe=config.num_experts > 0)
        tensors |= {f"mtp.layers.{i}.{name}": shape for name, shape in layer}
    return tensors


def require_mtp(
    weights: Iterable[tuple[str, torch.Tensor]], config: Qwen3NextConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all tensors unchanged, and refuse a checkpoint without any `mtp.*` tensor.

    Raises:
        CheckpointError: after the last tensor, if none was an MTP tensor.
    """
    found = False
    for name, tensor in weights:
        found = found or (our_name(name, config) or "").startswith(PREFIX)
        yield name, tensor
    if not found:
        raise CheckpointError(
            "MTP was asked for and the checkpoint has no mtp.* tensors (a save through "
            "transformers drops them): serve without --speculative-config (SGLang: "
            "--speculative-algorithm), or use the released checkpoint"
        )


def read_formats(folder: Path, hf_config: Any, quantization: Mapping[str, Any] | None) -> Formats:
    """The formats of the trunk's and the MTP layer's modules, by the files' headers; cached.

    Args:
        hf_config: the host's, of transformers.
        quantization: its quantization_config.

    Raises:
        CheckpointError: a module that is quantised in no way that is known.
    """
    raw = hf_config.to_json_string(use_diff=False)
    return _read_formats(folder, raw, json.dumps(quantization, default=str), env.quantise())


@cache
def _read_formats(folder: Path, hf_config: str, quantization: str, asked: str | None) -> Formats:
    config = Qwen3NextConfig.from_hf(json.loads(hf_config))
    shapes = trunk_tensors(config) | mtp_tensors(config)
    return formats_of(folder, config, shapes, json.loads(quantization), asked=asked)


def read_plain_modules(folder: Path, hf_config: Any) -> frozenset[str]:
    """Modules of the trunk and the MTP layer that the files have unquantised; cached.

    Raises:
        CheckpointError: a module of which a part is quantised, and another not.
    """
    return _read_plain_modules(folder, hf_config.to_json_string(use_diff=False))


@cache
def _read_plain_modules(folder: Path, hf_config: str) -> frozenset[str]:
    config = Qwen3NextConfig.from_hf(json.loads(hf_config))
    return plain_modules_of(folder, config, trunk_tensors(config) | mtp_tensors(config))


def check_stored(
    folder: Path,
    config: Qwen3NextConfig,
    *,
    quantised: bool,
    formats: Formats | None,
    with_mtp: bool,
) -> None:
    """Check a local checkpoint by its files' headers, before anything is loaded.

    Args:
        quantised, formats: see `parameters`.
        with_mtp: check the MTP tensors too, which are ignored otherwise.

    Raises:
        CheckpointError: a damaged file, or a tensor missing, unexpected or of another shape.
    """
    check_files(folder)
    trunk, mtp = trunk_tensors(config), mtp_tensors(config)
    parts = [(stored_tensors(folder), trunk, mtp)]
    if with_mtp:
        parts.append((require_mtp(stored_tensors(folder), config), mtp, trunk))
    for stored, expected, ignored in parts:
        tensors = parameters(
            stored,
            config,
            expected=expected,
            ignored=ignored,
            quantised=quantised,
            formats=formats,
        )
        deque(tensors, maxlen=0)
