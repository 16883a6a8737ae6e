"""The cores that SGLang computes with, as its own code reads our binding."""

import os

import pytest
from sglang.srt.utils.numa_utils import init_threads_binding

from qwen3next_plugin.engines.sglang.cpu.cores import BIND, THREADS, bind_cores
from qwen3next_plugin.machine.cores import share


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    """The variables are unset, and set back at the end."""
    for name in (BIND, THREADS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_each_rank_has_its_part():
    ranks = 3  # more than NUMA nodes, which SGLang refuses by default
    bind_cores(ranks)
    read = [init_threads_binding(numa_index=rank, world_size=ranks) for rank in range(ranks)]
    assert read == str(share(ranks)).split("|")
    assert os.environ[THREADS] == str(len(share(ranks).cpus[0]))


def test_the_only_rank_of_a_node_has_all_of_them():
    bind_cores(2, nodes=2)
    assert init_threads_binding(numa_index=0, world_size=2) == str(share(1))
    assert os.environ[THREADS] == str(len(share(1).cpus[0]))


def test_one_rank_is_bound_by_sglang():
    bind_cores(1)
    assert not {BIND, THREADS} & os.environ.keys()


def test_the_users_environment_wins(monkeypatch):
    monkeypatch.setenv(BIND, "0|0")
    bind_cores(2)
    assert os.environ[BIND] == "0|0"
    assert THREADS not in os.environ


def test_under_a_quota_threads_are_counted(grant, monkeypatch):
    grant("0::/\n", {"cpu.max": "100000 100000\n"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    bind_cores(1)
    assert (os.environ.get(BIND), os.environ[THREADS]) == (None, "1")
