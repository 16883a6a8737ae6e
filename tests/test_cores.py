"""Which cores the ranks of an engine get: masks, NUMA nodes, threads of a core, quotas."""

import os
import subprocess
import sys

import pytest

from qwen3next_plugin.machine import cgroups, cores
from qwen3next_plugin.machine.cores import quota, share

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Make up a machine: nodes × cores × threads, numbered as Linux does, and this mask."""

    def write(nodes: int, of_a_node: int, threads: int, allowed: set[int] | None = None) -> None:
        total = nodes * of_a_node
        for cpu in range(total * threads):
            folder = tmp_path / "cpus" / f"cpu{cpu}"
            (folder / "topology").mkdir(parents=True)
            (folder / f"node{cpu % total // of_a_node}").mkdir()
            siblings = ",".join(str(cpu % total + total * i) for i in range(threads))
            (folder / "topology" / "thread_siblings_list").write_text(siblings)
        mask = set(range(total * threads)) if allowed is None else allowed
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: mask)
        monkeypatch.setattr(cores, "CPUS", tmp_path / "cpus")
        monkeypatch.setattr(cgroups, "OWN", tmp_path / "none")

    return write


@pytest.mark.parametrize(
    ("shape", "ranks", "expected"),
    [
        pytest.param((1, 4, 1), 1, "0,1,2,3", id="all cores of a node"),
        pytest.param((1, 4, 2), 1, "0,1,2,3", id="one thread of each core"),
        pytest.param((1, 4, 2, {5, 6, 7}), 1, "5,6,7", id="the thread that the mask allows"),
        pytest.param((1, 4, 1, {1, 3}), 1, "1,3", id="the mask"),
        pytest.param((1, 4, 1), 2, "0,1|2,3", id="halves of a node"),
        pytest.param((1, 5, 1), 2, "0,1|2,3", id="equal parts: ranks wait for each other"),
        pytest.param((2, 2, 2), 2, "0,1|2,3", id="a node each"),
        pytest.param((2, 2, 1), 1, "0,1", id="one node, whose memory is near"),
        pytest.param((2, 4, 1, {0, 5, 6}), 1, "5,6", id="the node with most cores"),
        pytest.param((2, 4, 1), 4, "0,1|2,3|4,5|6,7", id="halves of two nodes"),
        pytest.param((1, 2, 1), 3, "0|1|0", id="more ranks than cores share them"),
    ],
)
def test_shares(made_up, shape, ranks, expected):
    made_up(*shape)
    assert (str(share(ranks)), share(ranks).threads) == (expected, None)


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000\n"}, 1, id="a container's, 1.5"),
        pytest.param("0::/a/b\n", {"a/cpu.max": "400000 100000\n"}, 4, id="of the cgroup above"),
        pytest.param(
            "0::/a\n",
            {"a/cpu.max": "800000 100000\n", "cpu.max": "300000 100000\n"},
            3,
            id="the least",
        ),
        pytest.param("0::/host/path\n", {"cpu.max": "200000 100000\n"}, 2, id="the host's path"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000\n"}, 1, id="half a core"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, None, id="no limit"),
        pytest.param("0::/\n", {}, None, id="no file"),
        pytest.param(
            "3:cpu,cpuacct:/a\n1:cpuset:/\n0::/\n",
            {"cpu/a/cpu.cfs_quota_us": "250000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            2,
            id="cgroups 1",
        ),
        pytest.param(
            "3:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"},
            None,
            id="cgroups 1, no limit",
        ),
    ],
)
def test_quotas(grant, own, files, granted):
    grant(own, files)
    assert quota() == granted


@pytest.mark.parametrize(
    ("cpu_max", "ranks", "threads"),
    [
        pytest.param("300000 100000", 1, 3, id="so many threads"),
        pytest.param("400000 100000", 2, 2, id="divided among ranks"),
        pytest.param("100000 100000", 2, 1, id="one each at least"),
        pytest.param("700000 100000", 1, 4, id="no more than there are cores"),
        pytest.param("800000 100000", 1, None, id="a quota of all CPUs limits nothing"),
    ],
)
def test_threads_under_a_quota(made_up, grant, cpu_max, ranks, threads):
    made_up(1, 4, 2)
    grant("0::/\n", {"cpu.max": cpu_max})
    assert share(ranks).threads == threads


@pytest.mark.parametrize("cpu", [CPUS[0], CPUS[-1]], ids=["first", "last"])
def test_a_real_mask(cpu):
    """Under taskset, on this machine."""
    code = "from qwen3next_plugin.machine.cores import share; print(share(1))"
    command = ["taskset", "-c", str(cpu), sys.executable, "-c", code]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(cpu)


def test_ranks_share_no_core_of_this_machine():
    flat = [cpu for group in share(2).cpus for cpu in group]
    assert set(flat) <= set(CPUS)
    assert len(set(flat)) == len(flat) or len(set(flat)) == 1
