"""The cores that vLLM computes with."""

import pytest
from vllm.config import VllmConfig
from vllm.utils import cpu_resource_utils
from vllm.utils.cpu_resource_utils import LogicalCPUInfo
from vllm.utils.ompmultiprocessing import OMPProcessManager

from qwen3next_plugin.engines.vllm.cpu.cores import RESERVED, use_both_cores

BIND = "VLLM_CPU_OMP_THREADS_BIND"


@pytest.mark.parametrize(
    ("cores", "threads", "asked", "computing"),
    [
        pytest.param(2, 1, None, [0, 1], id="both of two"),
        pytest.param(2, 2, None, [2, 3], id="both of two, a thread of each"),
        pytest.param(2, 1, "1", [0], id="as the user says"),
        pytest.param(1, 1, None, [0], id="the only one"),
        pytest.param(4, 1, None, [0, 1, 2], id="vLLM leaves one of four"),
    ],
)
def test_cores(
    cores: int,
    threads: int,
    asked: str | None,
    computing: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vLLM's own binding, on machines of other sizes."""
    cpus = [LogicalCPUInfo(cpu, cpu % cores, 0) for cpu in range(cores * threads)]
    for module in ("qwen3next_plugin.engines.vllm.cpu.cores", cpu_resource_utils.__name__):
        monkeypatch.setattr(f"{module}.get_allowed_cpu_list", lambda: cpus)
    monkeypatch.setattr(cpu_resource_utils, "get_visible_memory_node", lambda: [0])
    monkeypatch.delenv(BIND, raising=False)
    monkeypatch.setenv(RESERVED, asked or "")
    if asked is None:
        monkeypatch.delenv(RESERVED)
    use_both_cores()
    assert OMPProcessManager(VllmConfig()).cpu_lists == [computing]
