"""Images of preempted requests, and images' names in caches."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.engines.vllm.names import is_ours
from qwen3next_plugin.engines.vllm.patches import When, patch

AGAIN = "mm_features"  # what we add to vLLM's CachedRequestData: request → its images


@patch(
    When.IN_ENGINE,
    "vllm.v1.core.sched.scheduler.Scheduler._make_cached_request_data",
    reason="a preempted request whose images were in the prefix cache ends the engine: its "
    "worker never got the pixels",
    remove_when="vLLM sends them when it resumes a request",
)
def send_again(
    host: Callable[..., Any],
    scheduler: Any,
    running_reqs: list[Any],
    resumed_reqs: list[Any],
    num_scheduled_tokens: dict[str, int],
    spec_decode_tokens: dict[str, list[int]],
    req_to_new_blocks: dict[str, Any],
) -> Any:
    """Around `_make_cached_request_data`: send the images of requests that are resumed.

    If a request begins with a prefix-cache hit, vLLM sends images within the hit without pixels.
    After a preemption the hit may be shorter, and an encoder without pixels ends the engine.
    """
    found = host(
        *(scheduler, running_reqs, resumed_reqs),
        *(num_scheduled_tokens, spec_decode_tokens, req_to_new_blocks),
    )
    if resumed_reqs and is_ours(scheduler.vllm_config.model_config):
        images = {each.request_id: each.mm_features for each in resumed_reqs if each.mm_features}
        setattr(found, AGAIN, images)
    return found


@patch(
    When.IN_WORKER,
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._update_states",
    reason="the images that `send_again` has added are for the runner's requests",
    remove_when="`send_again` is removed",
)
def take_again(host: Callable[..., Any], runner: Any, scheduler_output: Any) -> Any:
    """Around `_update_states`: give the runner's requests the images that were sent again."""
    for request, images in getattr(scheduler_output.scheduled_cached_reqs, AGAIN, {}).items():
        runner.requests[request].mm_features = images
    return host(runner, scheduler_output)


@patch(
    When.CONFIGURED,
    "vllm.multimodal.processing.inputs.ProcessorInputs.get_mm_hashes",
    reason="a client's name of an image may be the hash of another, in the caches of all",
    remove_when="vLLM keeps given names and hashes apart",
    upstream="https://github.com/vllm-project/vllm/issues/55547",
)
def keep_names_apart(
    host: Callable[..., dict[str, list[str]]], inputs: Any, model_id: str, hash_algorithm: Any
) -> dict[str, list[str]]:
    """Around `get_mm_hashes`: keep names that clients give to images apart from hashes.

    Content hashes are not secret: a client could store another image under a known image's hash,
    and all clients would find that one in caches.
    """
    given = inputs.mm_uuid_items or {}
    return {
        kind: [
            f"given-{name}" if name == own else name
            for name, own in zip(names, given.get(kind, [None] * len(names)), strict=True)
        ]
        for kind, names in host(inputs, model_id, hash_algorithm).items()
    }
