"""What a control endpoint cannot do ends no server."""

import asyncio
from types import SimpleNamespace as Bag

import pytest
from fastapi import HTTPException

from qwen3next_plugin.engines.sglang.repairs import controls


@pytest.mark.parametrize("mode", [None, "stat"])
def test_experts_are_recorded_where_something_records(monkeypatch, mode):
    from sglang.srt import runtime_context

    flags = Bag(moe=Bag(expert_distribution_recorder_mode=mode))
    monkeypatch.setattr(runtime_context, "get_exec", lambda: flags)
    asked = []

    async def host(manager):
        asked.append(manager)

    if mode:
        asyncio.run(controls.record_experts(host, "manager"))
    else:
        with pytest.raises(HTTPException, match="no --expert-distribution-recorder-mode") as raised:
            asyncio.run(controls.record_experts(host, "manager"))
        assert raised.value.status_code == 400
    assert asked == ["manager"] * bool(mode)


@pytest.mark.parametrize("paused", [False, True])
@pytest.mark.parametrize("requests", [{}, {"a": None}])
def test_memory_is_released_while_nothing_runs(paused, requests):
    manager, asked = Bag(rid_to_state=requests, is_pause=paused), []

    async def host(*args):
        asked.append(args)

    if requests and not paused:
        with pytest.raises(ValueError, match="while no request runs or waits; wait, or use /pause"):
            asyncio.run(controls.release_if_idle(host, manager, "tags"))
    else:
        asyncio.run(controls.release_if_idle(host, manager, "tags"))
    assert asked == [(manager, "tags", None)] * (paused or not requests)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("scheduler", [None, Bag(_engine_paused=False), Bag(_engine_paused=True)])
def test_a_scheduler_keeps_its_memory_while_it_needs_it(idle, scheduler):
    paused, seen = scheduler is not None and scheduler._engine_paused, []

    def is_fully_idle(*, ignore_waiting):
        assert ignore_waiting == paused
        return idle

    updater = Bag(scheduler=scheduler, is_fully_idle=is_fully_idle)
    controls.release_memory(lambda *args: seen.append(args), updater, "tags")
    assert seen == [(updater, "tags")] * idle


@pytest.mark.parametrize(
    ("tags", "resumed"),
    [
        (["weights"], ["weights"]),
        (["kv_cache", "weights", "kv_cache", "other"], ["kv_cache", "weights"]),
        (None, ["kv_cache", "weights"]),
        (["cuda_graph"], None),
    ],
    ids=str,
)
def test_only_what_was_released_is_resumed(tags, resumed):
    updater, asked, seen = Bag(offload_tags={"kv_cache", "weights"}), Bag(tags=tags), []
    controls.resume_memory(lambda _, asked: seen.append(asked.tags), updater, asked)
    assert [sorted(each) for each in seen] == ([resumed] if resumed else [])
