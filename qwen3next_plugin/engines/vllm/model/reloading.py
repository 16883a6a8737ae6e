"""Other weights while serving: vLLM reloads those of the trunk, here the drafter's follow.

Names and shapes are checked before anything changes, so a wrong checkpoint leaves the old weights.
"""

from collections.abc import Iterable
from copy import copy
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.hub import local_folder
from qwen3next_plugin.engines.vllm.cpu.quantisation import READ_HERE
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.reading import check_tensors
from qwen3next_plugin.model.quantisation.in_panels import refuse_another

Tensors = list[tuple[str, torch.Tensor]]


def reload(runner: Any, path: str | None, given: Iterable[tuple[str, torch.Tensor]] | None) -> None:
    """Serve the weights that are given, or those of a folder, by default the model's own.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
        ConfigError: these flags allow no other weights.
    """
    config: VllmConfig = runner.vllm_config
    drafter = runner.drafter.model if runner.speculative_config is not None else None
    tensors = None if given is None else list(given)
    trunk = _text_model(runner.get_model())
    _check(trunk, config, path, tensors, with_mtp=drafter is not None)
    shared = None
    if drafter is not None:
        shared = copy(config)
        shared.model_config = config.speculative_config.draft_model_config
    runner.reload_weights(weights_iterator=tensors, weights_path=path)
    trunk.renew_head()
    if drafter is not None:
        with drafter.alone():
            reload_weights(shared, drafter, tensors, path, is_checkpoint_format=True)


def _text_model(model: Any) -> Any:
    return getattr(model, "language_model", model)


def _check(
    trunk: Any, config: VllmConfig, path: str | None, tensors: Tensors | None, *, with_mtp: bool
) -> None:
    refuse_another(trunk.formats)
    if config.lora_config is not None:
        raise ConfigError("weights are not reloaded under adapters: serve without --enable-lora")
    if tensors is None:
        if (found := config.load_config.load_format) not in READ_HERE:
            raise ConfigError(f"--load-format {found}: its weights are not reloaded; restart")
        model = config.model_config
        folder = Path(path) if path else local_folder(model.model, model.revision)
        tensors = list(stored_tensors(folder))
    check_tensors(
        tensors,
        trunk.config,
        quantised=trunk.quantised,
        formats=trunk.formats,
        with_mtp=with_mtp,
    )
