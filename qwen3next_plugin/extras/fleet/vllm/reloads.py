"""After a reload, resets what the old weights computed; refusals are answered with an error."""

from collections.abc import Callable
from typing import Any

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.engines.vllm.names import is_ours
from qwen3next_plugin.engines.vllm.patches import When, patch

RELOAD = "reload_weights"


@patch(
    When.IN_ENGINE,
    "vllm.v1.engine.core.EngineCore.collective_rpc",
    reason="after reload_weights vLLM would serve cached prefixes of the old weights",
    remove_when="vLLM resets its caches then",
    upstream="https://github.com/vllm-project/vllm/pull/46125",
)
def forget_old_weights(
    host: Callable[..., Any],
    core: Any,
    method: str | Callable[..., Any],
    timeout: float | None = None,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    """Around `collective_rpc`: after a reload of our model vLLM's caches are reset.

    Running requests continue with the new weights, after computing their tokens so far again.

    Raises:
        ConfigError: it cannot be done now, or workers refuse. They return why, because if they
            raised, vLLM would read only the first error, and the others as later answers.
    """
    ours = method == RELOAD and is_ours(core.vllm_config.model_config)
    parallel = core.vllm_config.parallel_config
    share = parallel.enable_expert_parallel and parallel.data_parallel_size > 1
    if ours and share and not core.is_scheduler_paused():
        raise ConfigError(
            "engines that share experts run steps together, and must all have the same weights in "
            "each: POST /pause?mode=keep, reload, then POST /resume"
        )
    if ours and core.scheduler.num_waiting_for_streaming_input:
        raise ConfigError(
            "a session of streaming input waits for its next piece, and holds what the old weights "
            "computed: end it, then reload"
        )
    results = host(core, method, timeout, args, kwargs)
    if ours:
        if results[0] is not None:
            raise ConfigError(results[0])
        # Not the pixels of images: they are the same, and the server knows which are here.
        if not core.reset_prefix_cache(reset_running_requests=True, reset_connector=True):
            raise RuntimeError("the prefix cache of the old weights could not be reset")
        core.reset_encoder_cache()
    return results
