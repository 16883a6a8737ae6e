"""What a control message cannot do is answered with an error, and ends no server."""

import asyncio
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace as Bag

import pytest
from fastapi import HTTPException

from qwen3next_plugin.extras.host_fixes.sglang import controls

ALONE = Bag(world_size=1)


def fail(*_):
    raise KeyError("nope_0")


def asked_kinds():
    """SGLang's messages that have an answer, and an instance of each."""
    from msgspec.structs import fields
    from sglang.srt.managers import io_struct

    for name, kind in vars(io_struct).items():
        if name.endswith(("Req", "ReqInput")) and hasattr(
            io_struct, name.removesuffix("Input") + "Output"
        ):
            required = {each.name: None for each in fields(kind) if each.required}
            yield kind(**required)


def test_any_message_is_answered_in_its_own_type():
    """As SGLang sends it from process to process."""
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    answers = [controls.handle(fail, ALONE, asked) for asked in asked_kinds()]
    assert len({type(answer) for answer in answers}) > 25
    for answer in answers:
        assert msgpack_decode(msgpack_encode(answer)).rid == "KeyError: 'nope_0'"
        assert not getattr(answer, "success", False)


def test_a_session_that_could_not_be_opened_keeps_its_name():
    from sglang.srt.managers.io_struct import OpenSessionReqInput

    asked = OpenSessionReqInput(capacity_of_str_len=1, session_id="a")
    answer = controls.handle(fail, ALONE, asked)
    assert (answer.session_id, answer.success) == ("a", False)


def test_a_message_without_an_answer_has_none():
    from sglang.srt.managers.io_struct import AbortReq

    assert controls.handle(fail, ALONE, AbortReq(rid="a")) is None
    assert controls.handle(lambda asked: asked.rid, ALONE, AbortReq(rid="a")) == "a"


@pytest.mark.parametrize("failed", [[None, None], [None, "OSError: full"], ["OSError: full", None]])
def test_ranks_agree_on_what_failed(monkeypatch, failed):
    import torch.distributed as dist
    from sglang.srt.managers.io_struct import SlowDownReqInput, SlowDownReqOutput

    def gather(every, mine, group):
        assert (mine, group) == (failed[0], "group")
        every[:] = failed

    def handler(asked):
        if failed[0]:
            raise OSError("full")
        return SlowDownReqOutput()

    monkeypatch.setattr(dist, "all_gather_object", gather)
    ranks, asked = Bag(world_size=2, cpu_group="group"), SlowDownReqInput(forward_sleep_time=None)
    answer = controls.handle(handler, ranks, asked)
    assert answer.rid == ("OSError: full" if any(failed) else None)


@pytest.mark.parametrize("text", [None, "KeyError: 1"])
def test_what_failed_is_raised_where_it_is_waited_for(text):
    async def host(communicator, asked):
        return [Bag(rid=None), Bag(rid=text)]

    if text is None:
        assert len(asyncio.run(controls.raise_failures(host, None, None))) == 2
    else:
        with pytest.raises(HTTPException, match=text) as raised:
            asyncio.run(controls.raise_failures(host, None, None))
        assert raised.value.status_code == 400


def test_prompts_are_not_guarded():
    from sglang.srt.managers import io_struct
    from sglang.utils import TypeBasedDispatcher

    def host(scheduler):
        kinds = (io_struct.TokenizedGenerateReqInput, io_struct.BatchTokenizedGenerateReqInput)
        control = io_struct.SlowDownReqInput
        scheduler._request_dispatcher = TypeBasedDispatcher(
            [(kind, fail) for kind in (*kinds, control)]
        )

    scheduler = Bag(tp_group=ALONE)
    controls.guard(host, scheduler)
    handlers = scheduler._request_dispatcher._mapping
    assert [handler is fail for handler in handlers.values()] == [True, True, False]


def test_a_group_waits_for_its_ranks_for_two_minutes():
    seen = []
    controls.wait_for_ranks(lambda **given: seen.append(given), rank=1)
    controls.wait_for_ranks(lambda **given: seen.append(given), timeout=timedelta(seconds=1))
    assert [each["timeout"].total_seconds() for each in seen] == [120, 1]


@pytest.mark.parametrize("seconds", [-1, 60, None, 1e300])
def test_a_step_is_slowed_down_by_a_minute_at_most(seconds):
    seen, asked, much = [], Bag(forward_sleep_time=seconds), seconds == 1e300
    with pytest.raises(ValueError, match="allowed are -inf to 60") if much else nullcontext():
        controls.slow_down(lambda *args: seen.append(args), "scheduler", asked)
    assert seen == [("scheduler", asked)] * (not much)


def test_a_bad_setting_of_the_log_is_not_kept():
    kept = Bag(log_requests_level=1)

    def host(log, *, log_requests_level):
        log.log_requests_level = log_requests_level
        raise ValueError("no such level")

    with pytest.raises(HTTPException, match="ValueError: no such level"):
        controls.configure_or_keep(host, kept, log_requests_level=99)
    assert kept.log_requests_level == 1


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
