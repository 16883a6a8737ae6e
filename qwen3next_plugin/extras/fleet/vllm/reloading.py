"""Loads new weights while serving: vLLM reloads the trunk's, and this file the drafter's.

Names and shapes are checked before anything changes, so a wrong checkpoint leaves the old weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_tp_group
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload.inplace import reload_weights as reload_inplace
from vllm.model_executor.models.utils import PPMissingLayer

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.vllm.files import weights_folder
from qwen3next_plugin.engines.vllm.model.loading import one_bar
from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.extras.fleet.agreement import refusal
from qwen3next_plugin.extras.fleet.vllm.shared_settings import refuse_other_weights
from qwen3next_plugin.model.checkpoint.errors import CheckpointError
from qwen3next_plugin.model.checkpoint.files import stored_tensors
from qwen3next_plugin.model.checkpoint.layouts import Shapes, tower_shapes, without_prefix
from qwen3next_plugin.model.checkpoint.mapped import give_back_freed
from qwen3next_plugin.model.checkpoint.reading import check_tensors
from qwen3next_plugin.model.checkpoint.tensors import EMBEDDING
from qwen3next_plugin.model.quantisation.files import check_version
from qwen3next_plugin.model.quantisation.in_panels import refuse_another

logger = init_logger(LOGGER)
Tensors = list[tuple[str, torch.Tensor]]


def reload_weights(
    worker: Any, path: str | None, given: Iterable[tuple[str, torch.Tensor]] | None
) -> str | None:
    """Load new weights in a worker; returns why they are refused."""
    with set_current_vllm_config(worker.vllm_config), one_bar(worker.vllm_config):
        refused = reload(worker.model_runner, path, given)
    give_back_freed()
    return refused


def reload(
    runner: Any, path: str | None, given: Iterable[tuple[str, torch.Tensor]] | None
) -> str | None:
    """Load the given weights, or those of a folder, which defaults to the last one.

    Returns: why they are refused, by this rank or another one; the old weights stay then.

    Raises:
        SystemExit: loading failed, so the model is part old and part new.
    """
    tensors = None if given is None else list(given)
    if refused := refusal(lambda: _check(runner, path, tensors), get_tp_group().cpu_group):
        return refused
    try:
        _load(runner, path, tensors)
    except Exception as error:
        logger.exception("qwen3next_plugin: other weights failed to load, so this worker ends")
        raise SystemExit(1) from error
    return None


def _load(runner: Any, path: str | None, tensors: Tensors | None) -> None:
    config: VllmConfig = runner.vllm_config
    runner.reload_weights(weights_iterator=tensors, weights_path=path)
    _renew_head(_text_model(runner))
    if runner.speculative_config is not None:
        drafter, shared = runner.drafter.model, copy(config)
        shared.model_config = config.speculative_config.draft_model_config
        with _alone(drafter):
            reload_inplace(shared, drafter, tensors, path, is_checkpoint_format=True)


def _renew_head(model: Any) -> None:
    """Pack a tied head again, because vLLM has loaded only the embedding."""
    if model.config.tie_word_embeddings:
        model.lm_head.quant_method.process_weights_after_loading(model.lm_head)


@contextmanager
def _alone(drafter: Any) -> Iterator[None]:
    """Within this context the drafter lacks the trunk's embedding and head, as when built."""
    embedding, head = drafter.model.embed_tokens, drafter.lm_head
    drafter.lm_head = PPMissingLayer()
    if EMBEDDING in drafter.trunk_names:
        drafter.model.embed_tokens = PPMissingLayer()
    try:
        yield
    finally:
        drafter.model.embed_tokens, drafter.lm_head = embedding, head


def _text_model(runner: Any) -> Any:
    model = runner.get_model()
    return getattr(model, "language_model", model)


def _check(runner: Any, path: str | None, tensors: Tensors | None) -> None:
    """Raise if these weights are wrong, or if the flags do not allow new weights."""
    config: VllmConfig = runner.vllm_config
    trunk = _text_model(runner)
    refuse_other_weights(config)
    refuse_another(trunk.formats)
    if trunk.fixed and (path is not None or tensors is not None):
        raise ConfigError(trunk.fixed)
    if config.lora_config is not None:
        raise ConfigError("weights are not reloaded under adapters: serve without --enable-lora")
    if tensors is None:
        folder = _folder(config, path)
        check_version(folder, trunk.formats)
        tensors = list(stored_tensors(folder))
    check_tensors(
        tensors,
        trunk.config,
        quantised=trunk.quantised,
        formats=trunk.formats,
        with_mtp=runner.speculative_config is not None,
    )
    if tower := getattr(runner.get_model(), "tower", None):
        of_tower = [each for each in tensors if without_prefix(each[0], trunk.config) is None]
        _check_tower(tower, of_tower)


def _check_tower(tower: Shapes, given: Tensors) -> None:
    """Raise unless these are the tensors that a vision tower was loaded from, with their shapes."""
    found = tower_shapes(given)
    for name in sorted(tower.keys() | found.keys()):
        if name not in found:
            raise CheckpointError(f"{name} is missing: download the checkpoint again")
        if name not in tower or found[name] != tower[name]:
            served = f"is {list(tower[name])}" if name in tower else "is not there"
            raise CheckpointError(
                f"{name} is {list(found[name])}, and in the vision tower that is served {served}: "
                f"restart the server to serve another one"
            )


def _folder(config: VllmConfig, path: str | None) -> Path:
    """The folder to load, by default the last one."""
    if (found := config.load_config.load_format) not in READ_HERE:
        raise ConfigError(f"--load-format {found}: its weights are not reloaded; restart")
    folder = Path(path) if path else weights_folder(config)
    if not folder.is_dir():
        raise ConfigError(f"weights_path = {folder}: no such folder")
    return folder
