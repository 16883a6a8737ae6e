"""When vLLM's engine lets weights change."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet.vllm.reloads import RELOAD, forget_old_weights


@pytest.fixture
def complete():
    """vLLM completes its configuration, as it does before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    def run(model, **flags):
        flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | flags
        return EngineArgs(model=str(model), **flags).create_engine_config()

    return run


@pytest.mark.parametrize(
    ("sessions", "share", "paused", "says"),
    [
        (1, False, False, "a session of streaming input waits"),
        (0, True, False, r"POST /pause\?mode=keep, reload, then POST /resume"),
        (0, True, True, ""),
        (0, False, False, ""),
    ],
)
def test_when_a_reload_has_to_wait(complete, checkpoint, sessions, share, paused, says):
    """By what vLLM's engine says of itself."""
    flags = {"data_parallel_size": 2, "enable_expert_parallel": share}
    core = SimpleNamespace(
        vllm_config=complete(checkpoint, **flags),
        scheduler=SimpleNamespace(num_waiting_for_streaming_input=sessions),
        is_scheduler_paused=lambda: paused,
        reset_prefix_cache=lambda **_: True,
        reset_encoder_cache=lambda: None,
    )
    called = []

    def host(_, method: str, *__: object) -> list[None]:
        called.append(method)
        return [None]

    with pytest.raises(ConfigError, match=says) if says else nullcontext():
        forget_old_weights(host, core, RELOAD)
    assert called == ([] if says else [RELOAD])
