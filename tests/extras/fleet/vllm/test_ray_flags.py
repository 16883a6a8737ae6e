"""Ray's workers on CPUs: what is refused at load, and whether our executor is still needed."""

import pytest
from vllm.platforms.cpu import CpuPlatform


@pytest.fixture
def complete():
    """vLLM completes its configuration, as it does before it starts a worker."""
    from vllm.engine.arg_utils import EngineArgs

    def run(model, **flags):
        flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | flags
        return EngineArgs(model=str(model), **flags).create_engine_config()

    return run


def test_cores_for_rays_workers_are_refused(monkeypatch, complete, checkpoint):
    monkeypatch.setattr("vllm.v1.executor.ray_utils.ray", object())
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1|0")  # never our own choice
    with pytest.raises(Exception, match=r"VLLM_CPU_OMP_THREADS_BIND with Ray: .*taskset"):
        complete(checkpoint, tensor_parallel_size=2, distributed_executor_backend="ray")


@pytest.mark.compat
def test_vllms_cpu_platform_is_nothing_to_ray():
    """Fails when Ray can place vLLM's own workers: then our executor of actors can go."""
    assert not CpuPlatform.ray_device_key
