"""SGLang's updates of weights, for our model on a CPU: the old ones stay unless all new ones fit.

SGLang answers 400 with what is wrong. A later failure, while weights load, ends the scheduler and
so the server. SGLang's modules are imported inside: patches are registered before SGLang has chosen
its device.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.hub import READ_HERE
from qwen3next_plugin.engines.sglang.fatal import FatalError
from qwen3next_plugin.engines.sglang.names import NO_UPDATES
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.fleet.agreement import refusal
from qwen3next_plugin.model.checkpoint.files import stored_tensors

WAYS = "/update_weights_from_disk, _from_tensor or _from_distributed"
DONE = "Succeeded to update model weights."


class HalfLoadedError(FatalError):
    """Some weights are new and others old."""


@patch(
    When.WITH_OURS,
    "sglang.srt.model_executor.model_runner_components.weight_updater."
    "_unsupported_derived_weight_cache_error",
    reason="SGLang refuses updates that are not ours, and does not say which are",
    remove_when="SGLang asks the model to check and to load",
)
def name_updates(host: Callable[..., str | None], model: Any = None) -> str | None:
    """Why SGLang itself may not update the weights, and how they are updated."""
    found = host(model)
    if found != NO_UPDATES:
        return found
    return found.replace("restart", f"on a CPU use {WAYS}, or restart")


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "update_weights_from_disk",
    reason="SGLang loads into parameters, which packing has dropped, and what is wrong shows "
    "when some weights are replaced",
    remove_when="SGLang asks the model to check and to load",
)
def update_from_disk(host: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Serve the weights of a folder, MTP layer and draft head included.

    Replaces a method of SGLang's manager in the scheduler.
    """
    if not ours(manager):
        return host(manager, request)
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqOutput

    from qwen3next_plugin.extras.fleet.sglang.reloading import stored_weights

    folder, load_format = Path(request.model_path), request.load_format
    with manager._observe_weight_load("disk"):
        refused = refusal(lambda: _check(manager, folder, load_format), manager.tp_cpu_group)
        if refused:
            return UpdateWeightFromDiskReqOutput(success=False, message=refused)
        replace(manager, lambda runner: stored_weights(runner, folder, load_format))
        for _, runner in manager._select_runners():
            runner.update_model_fields(
                runner.model,
                model_path=str(folder),
                load_format=load_format,
                load_config=runner.load_config,
            )
        manager.record_weight_version_after_update(request.weight_version)
        success, message = flush(manager, request)
    return UpdateWeightFromDiskReqOutput(success=success, message=message)


def ours(manager: Any) -> bool:
    """Whether our model serves."""
    from qwen3next_plugin.engines.sglang.model.loading import OurModel

    return isinstance(manager.tp_worker.model_runner.model, OurModel)


def replace(manager: Any, tensors: Callable[[Any], Any], selector: str = "all") -> None:
    """Load the tensors for each selected runner into its model, and make the draft head anew.

    Raises:
        HalfLoadedError: what went wrong meanwhile.
    """
    from qwen3next_plugin.extras.fleet.sglang.reloading import reload

    try:
        for _, runner in manager._select_runners(selector):
            reload(runner, tensors(runner))
        for role, runner in manager._select_runners():
            if role == "draft" and runner.model.draft_head is not None:
                runner.model.make_draft_head()
    except Exception as error:
        raise HalfLoadedError(f"weights are loaded in part: {error}") from error


def flush(manager: Any, request: Any) -> tuple[bool, str]:
    """Flush caches as SGLang does, but also directly after the last request's answer.

    SGLang removes requests that have ended from its batches only before its next step.

    Args: request: says by `flush_cache` and `torch_empty_cache` what to flush.
    """
    for batch in (manager.scheduler.running_batch, manager.scheduler.last_batch):
        if batch is not None and all(one.finished() for one in batch.reqs):
            batch.filter_batch()
    return manager.flush_cache_after_weight_update(request, True, DONE)


def _check(manager: Any, folder: Path, load_format: str) -> None:
    from qwen3next_plugin.extras.fleet.sglang.reloading import check_reload
    from qwen3next_plugin.model.quantisation.files import check_version

    if load_format not in READ_HERE:
        raise ConfigError(f"load_format = {load_format}: updates read safetensors files")
    if not folder.is_dir():
        raise ConfigError(f"model_path = {folder}: no such folder")
    model, drafts = manager.tp_worker.model_runner.model, manager.draft_worker is not None
    check_version(folder, model.formats)
    check_reload(model, stored_tensors(folder), with_mtp=drafts)
