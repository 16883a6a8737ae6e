"""The cores that vLLM computes with, as its own code reads our binding."""

import os

import pytest
from vllm.config import ParallelConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.ompmultiprocessing import OMPProcessManager

from qwen3next_plugin.engines.vllm.cpu.cores import BIND, OWN, bind_cores
from qwen3next_plugin.machine.cores import share

THREADS = "OMP_NUM_THREADS"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """The variables are unset, and set back at the end."""
    for name in (BIND, THREADS, *OWN):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def read(ranks: int) -> OMPProcessManager:
    """vLLM's view of the environment."""
    return OMPProcessManager(VllmConfig(parallel_config=ParallelConfig(tensor_parallel_size=ranks)))


def test_each_rank_has_its_part_also_after_an_engine_of_other_ranks():
    for ranks in (1, 2, 3, 1):
        bind_cores(ranks)
        assert read(ranks).cpu_lists == share(ranks).cpus


@pytest.mark.parametrize(("variable", "value"), [(BIND, "1"), *((name, "0") for name in OWN)])
def test_the_users_environment_wins(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    bind_cores(1)
    assert os.environ.get(BIND) == (value if variable == BIND else None)


@pytest.mark.parametrize("asked", [None, "5"])
def test_under_a_quota_threads_are_counted_not_bound(asked, grant, monkeypatch):
    grant("0::/\n", {"cpu.max": "100000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    if asked is not None:
        monkeypatch.setenv(THREADS, asked)
    bind_cores(1)
    assert read(1).skip_setup
    assert os.environ[THREADS] == (asked or "1")


def test_the_plugin_binds_the_ranks_of_a_flag(checkpoint):
    flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    config = EngineArgs(str(checkpoint), tensor_parallel_size=2, **flags).create_engine_config()
    assert OMPProcessManager(config).cpu_lists == share(2).cpus
