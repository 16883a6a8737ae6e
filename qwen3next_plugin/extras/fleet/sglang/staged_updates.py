"""SGLang's updates of weights by sessions: the tensors of all calls are loaded at the end.

SGLang would load each call's tensors as they come. Here a session keeps copies of them, in every
rank, and its end checks and loads them as updates.py does a folder. SGLang's modules are imported
inside, as there.
"""

from collections.abc import Callable
from typing import Any

import torch

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.fleet.agreement import refusal
from qwen3next_plugin.extras.fleet.sglang.updates import flush, ours, replace
from qwen3next_plugin.model.checkpoint.mapped import give_back_freed

BUCKET = "flattened_bucket"  # SGLang's load_format of tensors in one
SELECTED = ("all", "target")
Tensors = list[tuple[str, torch.Tensor]]


class Session:
    """Tensors and options of the calls so far; replaces SGLang's own session."""

    def __init__(self, selector: str) -> None:
        self.selector = selector
        self.flush_cache = self.torch_empty_cache = False
        self.weight_version: str | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, tensors: Tensors, request: Any) -> None:
        """Keep what a call brought; a tensor that comes again replaces the earlier one."""
        self._tensors.update(tensors)
        self.flush_cache |= request.flush_cache
        self.torch_empty_cache |= request.torch_empty_cache
        self.weight_version = request.weight_version or self.weight_version

    def check(self, manager: Any) -> None:
        """Refuse tensors that are not those of the selected models."""
        from qwen3next_plugin.extras.fleet.sglang.reloading import check_reload

        drafts = manager.draft_worker is not None and self.selector == "all"
        model = manager.tp_worker.model_runner.model
        check_reload(model, self._tensors.items(), with_mtp=drafts)

    def load(self, manager: Any) -> tuple[bool, str]:
        """Serve with the tensors, which are checked already."""
        replace(manager, lambda _: self._tensors.items(), self.selector)
        self._tensors.clear()
        give_back_freed()
        manager.record_weight_version_after_update(self.weight_version)
        return flush(manager, self)


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "begin_weight_update",
    reason="SGLang loads a call's tensors before it has the next call's, into parameters which "
    "packing has dropped",
    remove_when="SGLang checks a session's tensors together, and asks the model to load",
)
def begin(host: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Open a session; the weights stay until its end. Replaces a method of SGLang's manager."""
    if not ours(manager) or manager._session is not None:
        return host(manager, request)
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    refused = refusal(lambda: _check_begin(manager, request.selector), manager.tp_cpu_group)
    if refused is None:
        manager._session = Session(request.selector)
    return BeginWeightUpdateReqOutput(success=refused is None, message=refused or "Success")


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "update_weights_from_tensor",
    reason="SGLang loads a call's tensors before it has the next call's, into parameters which "
    "packing has dropped",
    remove_when="SGLang checks a session's tensors together, and asks the model to load",
)
def add_sent(host: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Keep tensors that were sent, until the end. Replaces a method of SGLang's manager."""
    if not isinstance(manager._session, Session):
        return host(manager, request)
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqOutput

    def read() -> Tensors:
        return _sent(manager, request.serialized_named_tensors, request.load_format)

    refused = _add(manager, request, read)
    return UpdateWeightsFromTensorReqOutput(success=refused is None, message=refused or "Success")


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "update_weights_from_distributed",
    reason="SGLang loads a call's tensors before it has the next call's, into parameters which "
    "packing has dropped",
    remove_when="SGLang checks a session's tensors together, and asks the model to load",
)
def add_broadcast(host: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Keep tensors that a trainer broadcasts. Replaces a method of SGLang's manager."""
    if not isinstance(manager._session, Session):
        return host(manager, request)
    from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqOutput

    def read() -> Tensors:
        return manager.tp_worker.model_runner.weight_updater.receive_weights_from_distributed(
            names=request.names,
            dtypes=request.dtypes,
            shapes=request.shapes,
            group_name=request.group_name,
            load_format=request.load_format,
        )

    refused = _add(manager, request, read)
    return UpdateWeightsFromDistributedReqOutput(
        success=refused is None, message=refused or "Success"
    )


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager."
    "end_weight_update",
    reason="SGLang loads a call's tensors before it has the next call's, into parameters which "
    "packing has dropped",
    remove_when="SGLang checks a session's tensors together, and asks the model to load",
)
def end(host: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Close the session: load all its tensors, or none. Replaces a method of SGLang's manager."""
    session = manager._session
    if not isinstance(session, Session):
        return host(manager, request)
    from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput

    manager._session = None
    with manager._observe_weight_load("tensor"):
        refused = refusal(lambda: session.check(manager), manager.tp_cpu_group)
        if refused:
            return EndWeightUpdateReqOutput(success=False, message=f"{refused}{_stays(session)}")
        success, message = session.load(manager)
    return EndWeightUpdateReqOutput(success=success, message=message)


def _stays(session: Session) -> str:
    """The sentence of a refusal on the weights in use."""
    if session.weight_version is None:
        return "; the old weights stay"
    return "; the old weights stay, give their version to /update_weight_version"


def _check_begin(manager: Any, selector: str) -> None:
    from qwen3next_plugin.extras.fleet.sglang.reloading import check_allowed

    if selector not in SELECTED:
        raise ConfigError(f"selector = {selector}: the MTP layer changes with the trunk; use all")
    check_allowed(manager.tp_worker.model_runner.model)


def _add(manager: Any, request: Any, read: Callable[[], Tensors]) -> str | None:
    """Keep the tensors of a call that every rank can read; returns why not."""
    session, found = manager._session, []

    def check() -> None:
        tensors = read()  # a broadcast, too, which the trainer waits for
        if request.selector not in ("all", session.selector):
            raise ConfigError(
                f"selector = {request.selector}: the session began with {session.selector}"
            )
        found.extend(_copied(tensors))

    refused = refusal(check, manager.tp_cpu_group)
    if refused is None:
        session.add(found, request)
    return refused


def _sent(manager: Any, payloads: list[bytes], load_format: str | None) -> Any:
    """This rank's tensors of a call, in the memory of its sender."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import (
        LocalSerializedTensor,
    )
    from sglang.srt.runtime_context import get_parallel
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    if load_format not in (None, BUCKET):
        raise ConfigError(f"load_format = {load_format}: leave it out, or use {BUCKET}")
    sent, rank = manager.tp_worker.deserialize_own_rank(payloads), get_parallel().tp_rank
    if load_format == BUCKET:
        return FlattenedTensorBucket(**sent).reconstruct_tensors()
    return [
        (name, tensor.get(rank) if isinstance(tensor, LocalSerializedTensor) else tensor)
        for name, tensor in sent
    ]


def _copied(tensors: Tensors) -> Tensors:
    """Copies, because the sender may reuse the memory after its call."""
    for name, tensor in tensors:
        if not (isinstance(name, str) and isinstance(tensor, torch.Tensor)):
            raise ConfigError(f"{name!r}: names and tensors are expected, in pairs")
    return [(name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors]
