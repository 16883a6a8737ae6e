"""The memory that a process may use, and the weights that are refused because of it."""

import math
import os

import pytest

from checkpoints import BASE
from qwen3next_plugin.config import ConfigError, Qwen3NextConfig
from qwen3next_plugin.engines.memory import (
    LEAST_POOLS,
    check_weights,
    default_pools,
    granted,
    room,
    share_of,
)
from qwen3next_plugin.machine.cgroups import memory_bytes, memory_left
from qwen3next_plugin.model.checkpoint.sizes import rank_bytes, served_bytes, without_mtp

MACHINE = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1 << 20


@pytest.mark.parametrize(
    ("own", "files", "granted"),
    [
        pytest.param("0::/\n", {"memory.max": "1048576\n"}, MIB, id="a container's"),
        pytest.param("0::/a/b\n", {"a/memory.max": "1048576\n"}, MIB, id="of the cgroup above"),
        pytest.param(
            "0::/a\n",
            {"a/memory.max": "2097152\n", "memory.max": "1048576\n"},
            MIB,
            id="the least",
        ),
        pytest.param("0::/\n", {"memory.max": "max\n"}, MACHINE, id="no limit"),
        pytest.param("0::/\n", {}, MACHINE, id="no file"),
        pytest.param(
            "4:memory:/a\n3:cpu:/\n0::/\n",
            {"memory/a/memory.limit_in_bytes": "1048576\n"},
            MIB,
            id="cgroups 1",
        ),
        pytest.param(
            "4:memory:/\n",
            {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"},
            MACHINE,
            id="cgroups 1, no limit",
        ),
    ],
)
def test_limits(grant, own, files, granted):
    grant(own, files)
    assert memory_bytes() == granted


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        pytest.param("0::/\n", {}, math.inf, id="no limit"),
        pytest.param("0::/a\n", {"a/memory.max": "max\n"}, math.inf, id="none in words"),
        pytest.param(
            "0::/a\n",
            {
                "a/memory.max": f"{24 * MIB}\n",
                "a/memory.current": f"{23 * MIB}\n",
                "a/memory.stat": f"file {9}\nactive_file {2 * MIB}\ninactive_file {16 * MIB}\n",
            },
            19 * MIB,
            id="files can be dropped",
        ),
        pytest.param(
            "4:memory:/a\n",
            {
                "memory/a/memory.limit_in_bytes": f"{24 * MIB}\n",
                "memory/a/memory.usage_in_bytes": f"{23 * MIB}\n",
                "memory/a/memory.stat": f"inactive_file {MIB}\ntotal_inactive_file {2 * MIB}\n",
            },
            3 * MIB,
            id="cgroups 1",
        ),
    ],
)
def test_what_is_left(grant, own, files, left):
    grant(own, files)
    assert memory_left() == left


@pytest.mark.parametrize("quantise", [None, "int8", "int4"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_fit_or_are_refused(monkeypatch, grant_memory, ranks, quantise):
    """By a byte. Both ranks hold what is not divided, and swap counts."""
    if quantise:
        monkeypatch.setenv("QWEN3NEXT_QUANTISE", quantise)
    config = Qwen3NextConfig.from_hf(BASE, tp_size=ranks)
    sizes = served_bytes(config, 2, asked=quantise)
    trunk = without_mtp(sizes)
    needed = ranks * sum(rank_bytes(trunk, config).values())
    assert sum(trunk.values()) <= needed < sum(trunk.values()) * 1.1
    for nbytes, swap in ((needed, 0), (needed - 1024, 1024)):
        grant_memory(nbytes, swap)
        check_weights(sizes, config, ranks)
    grant_memory(needed - 1)
    with pytest.raises(ConfigError, match=r"\d\.\d\d MiB: .* fewer bits .*QWEN3NEXT_QUANTISE=int4"):
        check_weights(sizes, config, ranks)
    check_weights(sizes, config, 0)  # none of the ranks is on this machine


GIB = 1 << 30


def test_what_ranks_are_granted():
    """Of 24 GiB, besides prefixes in /dev/shm; 2 GiB of each are for processes and activations."""
    assert granted(24 * GIB) == 22 * GIB
    assert granted(24 * GIB, ranks=2, pinned=4 * GIB) == 8 * GIB
    assert granted(GIB) == 0


def test_ranks_share_a_machine(monkeypatch, grant_memory):
    grant_memory(24 * GIB)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)})
    share = share_of(2, mapped=6 * GIB, pinned=4 * GIB)
    assert share == {"memory": 8 * GIB, "threads": 4, "mapped": 3 * GIB}
    assert share_of(16, mapped=0)["threads"] == 1


@pytest.mark.parametrize(
    ("left", "mapped", "request_gib", "pools"),
    [
        (16, 0, 1, 4),
        (16, 0, 9, 9),
        (16, 0, 17, 16),
        (16, 8, 1, 2),  # mapped weights stay in the page cache
        (16, 8, 9, 8),
        (16, 20, 9, LEAST_POOLS // GIB),  # or lose some of it
        (1, 20, 9, 1),
        (-3, 0, 1, 0),
    ],
)
def test_states_and_kv_take_a_quarter_or_a_request(left, mapped, request_gib, pools):
    assert default_pools(room(left * GIB, mapped * GIB), request_gib * GIB) == pools * GIB
