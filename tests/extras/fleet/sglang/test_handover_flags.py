"""Prefill and decode on two servers: refusals at start, and settings that both must share."""

import inspect
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace as Bag
from typing import Any

import pytest
import torch

from checkpoints import write_checkpoint
from damage import SLIGHT, slightly_changed
from qwen3next_plugin.config import ConfigError
from qwen3next_plugin.extras.fleet import computed_by as computed
from qwen3next_plugin.extras.fleet.nixl import WAIT
from qwen3next_plugin.extras.fleet.sglang import handover, handover_flags
from qwen3next_plugin.extras.fleet.sglang.handover_flags import SERVED_APART, check_handover
from qwen3next_plugin.extras.fleet.sglang.shared_settings import refuse_other_weights
from qwen3next_plugin.model.state import PageLayout

OURS = Bag(hf_config=Bag(architectures=["Qwen3NextForCausalLM"]))
OTHER = Bag(hf_config=Bag(architectures=["LlamaForCausalLM"]))
LAYOUT = PageLayout(
    num_key_heads=2,
    num_value_heads=4,
    key_dim=32,
    value_dim=16,
    num_drafts=0,
    activation_dtype=torch.float32,
    state_dtype=torch.float32,
)


def given(**changes: Any) -> Bag:
    """What a server is started with."""
    flags = {name: values[0] for name, (values, _, _) in SERVED_APART.items()} | {
        "disaggregation_mode": "decode",
        "enable_lora": None,
        "lora_paths": None,
        "load_format": "auto",
    }
    return Bag(**(flags | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"enable_lora": True}, "--enable-lora: the other server .*serve without adapters, or lea"),
        ({"lora_paths": {"a": "b"}}, "--enable-lora: .*leave out --disaggregation-mode"),
        ({"load_format": "dummy"}, "--load-format dummy: .*leave it out"),
    ],
    ids=str,
)
def test_what_would_give_wrong_text_is_refused_by_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_handover(given(**changes))
    check_handover(given(**changes, disaggregation_mode="null"))


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(handover_flags, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'qwen3next-plugin\[nixl\]', or leave out"):
        check_handover(given())


def test_other_weights_are_refused_while_serving():
    with pytest.raises(ConfigError, match=r"digest .* serve without --disaggregation-mode"):
        refuse_other_weights(given())
    refuse_other_weights(given(disaggregation_mode="null"))


@pytest.fixture
def told(monkeypatch, checkpoint):
    """What a server says of itself."""
    from sglang.srt import runtime_context as context
    from sglang.srt.arg_groups import model_override_base as models

    from qwen3next_plugin.engines.sglang.state import pages

    def run(model: Path = checkpoint, ranks: int = 1, eps: float = 1e-6, **layout: Any) -> str:
        args = Bag(model_path=str(model), revision=None, download_dir=None, attention_backend="own")
        hf_config = Bag(to_dict=lambda: {"rms_norm_eps": eps, "_name_or_path": str(model)})
        config = Bag(hf_config=hf_config, hf_text_config=None)
        monkeypatch.setattr(context, "get_server_args", lambda: args)
        monkeypatch.setattr(context, "get_parallel", lambda: Bag(tp_size=ranks))
        monkeypatch.setattr(models, "model_config_of", lambda _: config)
        monkeypatch.setattr(pages, "page_layout", lambda _: replace(LAYOUT, **layout))
        return handover.described_settings.__wrapped__()

    return run


def test_servers_say_what_they_must_have_alike(monkeypatch, told, checkpoint, tmp_path):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile))
    assert told() == told(copied)
    assert "dtype=float32, speculative_num_steps=0, tp_size=1, page_bytes=" in told()
    found = [
        told(),
        told(activation_dtype=torch.bfloat16),
        told(state_dtype=torch.bfloat16),
        told(num_drafts=2),
        told(ranks=2),
        told(eps=1e-5),
        told(write_checkpoint(tmp_path / "others", seed=9)),
        *(told(slightly_changed(checkpoint, tmp_path / w, w)) for w in SLIGHT),
    ]
    monkeypatch.setattr(computed, "instructions", lambda: ["another processor"])
    found.append(told())
    assert len(set(found)) == len(found)


@pytest.fixture
def same(monkeypatch):
    """A server of a model says "same" of itself."""
    from sglang.srt import runtime_context as context
    from sglang.srt.arg_groups import model_override_base as models

    def of(config: Any) -> None:
        monkeypatch.setattr(context, "get_server_args", given)
        monkeypatch.setattr(models, "model_config_of", lambda _: config)
        monkeypatch.setattr(handover, "described_settings", lambda: "same")

    return of


@pytest.mark.parametrize(("config", "layout"), [(OURS, "same"), (OTHER, None)], ids=["ours", "no"])
def test_a_prefill_server_registers_with_it(same, config, layout):
    same(config)
    manager, seen = Bag(kv_layout=None), []
    handover.with_settings(lambda it: seen.append(it.kv_layout), manager)
    assert seen == [layout]


@pytest.mark.parametrize(
    ("config", "registered", "served"),
    [
        (OURS, "same", True),
        (OURS, "another", False),
        (OURS, None, False),
        (OTHER, None, True),
    ],
)
def test_a_request_of_another_server_fails_with_a_reason(same, config, registered, served):
    from sglang.srt.disaggregation.base import KVPoll

    same(config)
    reasons, statuses, asked = {}, {}, []
    manager = Bag(
        prefill_info_table={"a:1": Bag(kv_layout=registered)},
        record_failure=reasons.__setitem__,
        update_status=statuses.__setitem__,
    )
    receiver = Bag(kv_mgr=manager, bootstrap_addr="a:1", bootstrap_room=7, conclude_state=None)
    handover.refuse_others(lambda it, rank: asked.append(rank), receiver, 0)
    if served:
        assert (asked, reasons, receiver.conclude_state) == ([0], {}, None)
        return
    assert (asked, statuses, receiver.conclude_state) == ([], {7: KVPoll.Failed}, KVPoll.Failed)
    assert f"at a:1 is not alike; Local: (same), Remote: ({registered})" in reasons[7]


@pytest.mark.parametrize("error", [RuntimeError("page size"), AssertionError("ranks")], ids=repr)
def test_a_prefill_server_of_another_configuration_is_not_known(same, caplog, error):
    """The reason is logged once."""

    def host(manager: Any, address: str) -> bool:
        raise error

    same(OURS)
    handover._say_once.cache_clear()
    with caplog.at_level("ERROR"):
        assert not any(handover.survive_others(host, None, "a:1") for _ in range(2))
    assert caplog.text.count(f"at a:1 is not alike: {error}") == 1
    assert handover.survive_others(lambda *_: True, None, "a:1")
    same(OTHER)
    with pytest.raises(type(error)):
        handover.survive_others(host, None, "a:1")


class Asked(Bag):
    """A request, as SGLang's queues have it."""

    def __init__(self, host: str, room: int) -> None:
        super().__init__(bootstrap_host=host, bootstrap_room=room, finished_reason=None)
        self.return_logprob = False

    def finished(self) -> bool:
        return self.finished_reason is not None


def test_a_room_that_is_in_use_is_refused():
    queue, added = Bag(scheduler=Bag(model_config=OURS)), []

    def add(request: Asked) -> bool:
        handover.refuse_same_room(lambda queue, req: added.append(req), queue, request)
        assert added[-1] is request
        return not request.finished()

    first, second, third = (Asked("10.0.0.1", 77) for _ in range(3))
    assert add(first)
    assert add(first)  # it was retracted
    assert not add(second)
    reason = second.finished_reason.to_json()
    assert reason["status_code"] == 400
    assert "bootstrap_room 77 is in use" in reason["message"]
    first.finished_reason = "length"
    assert add(third)
    own = Asked("2.2.2.2", 0), Asked("2.2.2.2", 0)
    assert all(map(add, own))


def test_memory_that_a_prefill_server_may_write_is_kept(monkeypatch):
    """Until it says that it is done, or is gone; also by one that was started anew meanwhile."""
    from sglang.srt.disaggregation.decode import DecodeTransferQueue

    asked, freed, safe, server = [], [], set(), Bag()
    manager = Bag(
        prefill_info_table={"a:1": server},
        is_abort_release_safe=lambda room, acks: room in safe,
    )

    def held(room: int) -> tuple:
        receiver = Bag(
            **{"kv_mgr": manager, "bootstrap_addr": "a:1", "prefill_info": server},
            _send_abort_notification=lambda force_arm: asked.append(room),
        )
        return Bag(req=Bag(bootstrap_room=room), kv_receiver=receiver), 0.0, 30.0, room, 1

    queue = Bag(
        _deferred_releases=[held(1), held(2)],
        deferred_kv_release_timeout=30.0,
        gloo_group=None,
        _is_host_destination=lambda _: False,
        _do_release=lambda decoding, index: freed.append(index),
        _observe_deferred_kv_release=lambda **_: None,
    )
    decode = sys.modules[DecodeTransferQueue.__module__]
    monkeypatch.setattr(decode, "all_reduce_flags", lambda flags, **_: flags)

    def at(seconds: float) -> list[int]:
        monkeypatch.setattr(decode.time, "monotonic", lambda: seconds)
        host = inspect.unwrap(DecodeTransferQueue.resolve_deferred_releases)
        handover.hold_what_may_be_written(host, queue)
        return list(freed)

    assert (at(29), asked) == ([], [])
    assert (at(31), asked) == ([], [1, 2])
    assert (at(60), asked) == ([], [1, 2])
    safe.add(1)
    assert (at(62), asked) == ([1], [1, 2, 2])
    manager.prefill_info_table["a:1"] = Bag()  # another, after its heart had stopped
    assert (at(91), at(93), asked) == ([1], [1, 2], [1, 2, 2])


def test_nixl_copies_main_memory_and_waits_for_data(same, monkeypatch):
    """While the scheduler makes its manager of transfers, and no longer.

    Its threads get the cores of the parent process.
    """
    same(OURS)
    cores = {0: {3}, 17: {3, 4}}
    monkeypatch.setattr(os, "getppid", lambda: 17)
    monkeypatch.setattr(os, "sched_getaffinity", cores.__getitem__)
    monkeypatch.setattr(os, "sched_setaffinity", cores.__setitem__)
    bindings = Bag(nixlAgent=lambda name, config: config)

    def nixl_agent(name: str, config: Any) -> Bag:
        made = bindings.nixlAgent(name, config)
        return Bag(nixl_mems={"DRAM": 0, "VRAM": 1, "FILE": 2}, config=made)

    api, made = Bag(nixl_agent=nixl_agent, nixlBind=bindings), []
    monkeypatch.setitem(sys.modules, "nixl", Bag(_api=api))
    monkeypatch.setitem(sys.modules, "nixl._api", api)

    def host(scheduler: Any) -> None:
        made.append((api.nixl_agent("name", Bag(pthrDelay=0)), cores[0]))

    for config in (OURS, OTHER):
        handover.beside_computation(host, Bag(model_config=config))
    (ours, of_ours), (other, of_other) = made
    assert (of_ours, of_other, cores[0]) == ({3, 4}, {3}, {3})
    assert (ours.nixl_mems, ours.config.pthrDelay) == ({"DRAM": 0, "VRAM": 0, "FILE": 2}, WAIT)
    assert (other.nixl_mems["VRAM"], other.config.pthrDelay) == (1, 0)
    assert api.nixl_agent is nixl_agent


@pytest.mark.parametrize(("host", "begun"), [("2.2.2.2", [(3, 5)]), ("10.0.0.1", [])])
def test_a_page_is_made_for_a_prompt_that_nobody_reads(monkeypatch, host, begun):
    seen, sent = [], []
    monkeypatch.setattr(handover, "begin_at", lambda _, *where: seen.append(where))
    queue = Bag(scheduler=Bag(model_config=OURS), req_to_token_pool=Bag(mamba_pool=None))
    kv = Bag(mamba_pool_idx=torch.tensor(3), kv_committed_len=5)
    decoding = Bag(req=Bag(bootstrap_host=host, kv=kv))
    handover.begin_unread_page(
        lambda *args, **kwargs: sent.append((args[2:], kwargs)), queue, decoding, 1, 2, a=3
    )
    assert (seen, sent) == (begun, [((1, 2), {"a": 3})])


def test_a_page_of_a_prompt_that_nobody_reads_continues_at_its_end():
    """Of every layer; other pages stay."""
    size = LAYOUT.page_bytes
    pages = torch.full((3, 4, size), 77, dtype=torch.uint8)
    pool = Bag(pages=pages, mamba_layer_ids=[0, 2, 5])
    pool.view = lambda layer_id: LAYOUT.view(pages[pool.mamba_layer_ids.index(layer_id)])
    handover.begin_at(pool, 2, 5)
    for view in map(pool.view, pool.mamba_layer_ids):
        assert view.span[2].tolist() == [5, 5]
        assert not view.state[2].any()
    assert (pages[:, [1, 3]] == 77).all()
