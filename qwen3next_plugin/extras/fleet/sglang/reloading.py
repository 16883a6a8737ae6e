"""Loads new weights while serving: checks them first, then loads as at the start."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.model_loader.loader import DefaultModelLoader, get_model_loader
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import get_server_args
from sglang.srt.utils import use_intel_amx_backend

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.model.loading import OurModel
from qwen3next_plugin.extras.fleet.sglang.shared_settings import refuse_other_weights
from qwen3next_plugin.model.checkpoint import progress
from qwen3next_plugin.model.checkpoint.mapped import give_back_freed
from qwen3next_plugin.model.checkpoint.reading import check_tensors
from qwen3next_plugin.model.quantisation.in_panels import refuse_another

Stream = Iterable[tuple[str, torch.Tensor]]


def check_reload(model: OurModel, tensors: Stream, *, with_mtp: bool) -> None:
    """Refuse tensors that are not those of the trunk, and of the MTP layer if that is asked for.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
        ConfigError: as `check_allowed`.
    """
    check_allowed(model)
    check_tensors(
        list(tensors),
        model.config,
        quantised=model.quantised,
        formats=model.formats,
        with_mtp=with_mtp,
    )


def check_allowed(model: OurModel) -> None:
    """Refuse an update if flags or this machine do not allow new weights.

    Raises:
        ConfigError: why, and the fix.
    """
    refuse_another(model.formats)
    refuse_other_weights(get_server_args())
    if get_server_args().enable_lora:
        raise ConfigError("weights are not updated under adapters: serve without --enable-lora")
    if model.blanks is None:  # only `load_weights` makes them
        raise ConfigError(
            "weights that no checkpoint gave are not updated: start with --load-format auto"
        )
    if model.fixed:
        raise ConfigError(model.fixed)
    if getattr(model, "visual", None) is not None:
        raise ConfigError("weights of a vision tower are not updated: add --language-model-only")
    if any(use_intel_amx_backend(layer) for layer in model.modules()):
        raise ConfigError("weights that SGLang has packed for AMX are not updated: restart")


def stored_weights(runner: Any, folder: Path, load_format: str) -> Iterator[Any]:
    """The tensors of a folder, as SGLang reads them for this runner's model."""
    config = runner.model_config
    config.model_path = str(folder)
    loader = get_model_loader(LoadConfig(load_format=load_format), config)
    return loader._get_weights_iterator(DefaultModelLoader.Source.init_new(config, runner.model))


def reload(runner: Any, tensors: Stream) -> None:
    """Load new weights, already checked, into a runner's model."""
    model = runner.model
    model.blanks.restore()
    with set_default_torch_dtype(runner.model_config.dtype):
        DefaultModelLoader.load_weights_and_postprocess(model, tensors, torch.device(runner.device))
    progress.finish()
    give_back_freed()
