"""Weights: names and shapes of the MTP tensors in a checkpoint, and a check that they exist."""

from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.model.layouts import our_name
from qwen3next_plugin.model.weights import (
    CheckpointError,
    check_files,
    decoder_layer_tensors,
    parameters,
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


def check_stored(folder: Path, config: Qwen3NextConfig, *, quantised: bool, with_mtp: bool) -> None:
    """Check a local checkpoint by its files' headers, before anything is loaded.

    Args:
        quantised: see `checked`.
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
            stored, config, expected=expected, ignored=ignored, quantised=quantised
        )
        deque(tensors, maxlen=0)
