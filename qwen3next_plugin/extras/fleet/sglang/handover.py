"""Prefill on one server, decode on another: pages through SGLang's NIXL backend, on CPUs.

SGLang's prefill server writes a request's KV and, with the last of it, its pages into the decode
server's memory. A page is a state of bytes, copied whole, and only between servers that share all
settings on which its content depends. SGLang's modules are imported inside: patches are registered
before SGLang has chosen its device.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from http import HTTPStatus
from importlib import import_module
from typing import Any
from weakref import WeakValueDictionary

from qwen3next_plugin.engines.sglang.names import is_ours, logger, serves_ours
from qwen3next_plugin.engines.sglang.patches import When, patch
from qwen3next_plugin.extras.fleet.computed_by import digest
from qwen3next_plugin.extras.fleet.nixl import waiting
from qwen3next_plugin.extras.fleet.sglang.handover_flags import hands_over
from qwen3next_plugin.extras.fleet.sglang.shared_settings import settings_of, weights

_of_room: WeakValueDictionary[int, Any] = WeakValueDictionary()  # room → its last request


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.common.conn.CommonKVManager.register_to_bootstrap",
    reason="SGLang compares neither weights nor states between two servers",
    remove_when="a model can add to what is compared",
)
def with_settings(host: Callable[[Any], None], manager: Any) -> None:
    """Send our digest in SGLang's `kv_layout` field.

    SGLang itself compares layouts only where both servers name one, and ends the decode server.
    """
    if serves_ours():
        manager.kv_layout = described_settings()
    host(manager)


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.common.conn.CommonKVReceiver.init",
    reason="a page of another size would be written beside its place; where SGLang compares, it "
    "ends the decode server",
    remove_when="SGLang fails a request whose prefill server has other states",
)
def refuse_others(host: Callable[..., None], receiver: Any, prefill_dp_rank: int) -> None:
    """Fail a decode server's request unless its prefill server has the same settings."""
    from sglang.srt.disaggregation.base import KVPoll

    manager, room = receiver.kv_mgr, receiver.bootstrap_room
    registered = manager.prefill_info_table.get(receiver.bootstrap_addr)  # None: it has ended
    if registered is None or not serves_ours() or registered.kv_layout == described_settings():
        host(receiver, prefill_dp_rank)
        return
    manager.record_failure(
        room,
        f"qwen3next_plugin: the prefill server at {receiver.bootstrap_addr} is not alike; "
        f"Local: ({described_settings()}), Remote: ({registered.kv_layout})",
    )
    receiver.conclude_state = KVPoll.Failed
    manager.update_status(room, KVPoll.Failed)


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.common.conn.CommonKVManager.try_ensure_parallel_info",
    reason="a prefill server of another page size, or of ranks that do not divide ours, ends "
    "the decode server",
    remove_when="SGLang fails a request whose prefill server does not match",
    upstream="https://github.com/sgl-project/sglang/pull/14474",
)
def survive_others(host: Callable[..., bool], manager: Any, bootstrap_addr: str) -> bool:
    """Whether SGLang knows the prefill server; False, not an error, if both do not match.

    SGLang then retries a few times, and fails the requests.
    """
    try:
        return host(manager, bootstrap_addr)
    except (RuntimeError, AssertionError) as error:
        if not serves_ours():
            raise
        _say_once(bootstrap_addr, str(error))
        return False


@cache
def _say_once(bootstrap_addr: str, why: str) -> None:
    logger.error("qwen3next_plugin: the prefill server at %s is not alike: %s", bootstrap_addr, why)


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.prefill.PrefillBootstrapQueue.add",
    "sglang.srt.disaggregation.decode.DecodePreallocQueue.add",
    reason="two requests of one room end the prefill server, or wait forever",
    remove_when="SGLang refuses a room that is in use",
    upstream="https://github.com/sgl-project/sglang/issues/40125",
)
def refuse_same_room(
    host: Callable[..., None], queue: Any, req: Any, *args: Any, **kwargs: Any
) -> None:
    """Abort a request whose room is in use; queue: the first one of a prefill or decode server."""
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, prepare_abort

    if req.bootstrap_host != FAKE_BOOTSTRAP_HOST and is_ours(queue.scheduler.model_config):
        room = req.bootstrap_room
        other = _of_room.get(room, req)
        if other is req or other.finished():
            _of_room[room] = req
        else:  # SGLang's queue then answers
            why = f"bootstrap_room {room} is in use by another request; choose another"
            prepare_abort(req, why, HTTPStatus.BAD_REQUEST)
    host(queue, req, *args, **kwargs)


@cache
def described_settings() -> str:
    """This rank's values of the settings that both servers must share, in readable form."""
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.runtime_context import get_parallel, get_server_args

    from qwen3next_plugin.engines.sglang.state.pages import page_layout

    server_args = get_server_args()
    model_config = model_config_of(server_args)
    layout = page_layout(model_config.hf_text_config)
    dtype = str(layout.activation_dtype).removeprefix("torch.")
    rest = digest(settings_of(server_args, model_config, layout))
    return (
        f"weights={weights(server_args)}, dtype={dtype}, "
        f"speculative_num_steps={layout.num_drafts}, tp_size={get_parallel().tp_size}, "
        f"page_bytes={layout.page_bytes}, rest={rest}"
    )


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.decode.DecodePreallocQueue._send_kv_metadata",
    reason="SGLang checks a decode server's health with requests whose state it leaves as it "
    "was; a page says where it continues, which ends the server",
    remove_when="SGLang's checks have a prefill, or a pool is asked for their states",
)
def begin_unread_page(
    host: Callable[..., None], queue: Any, decoding: Any, *args: Any, **kwargs: Any
) -> None:
    """Make the page of a request without a prefill server; queue: a decode server's.

    SGLang checks a decode server with such requests, at start and for /health.
    """
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    request = decoding.req
    unread = request.bootstrap_host == FAKE_BOOTSTRAP_HOST
    if unread and is_ours(queue.scheduler.model_config):
        pool, kv = queue.req_to_token_pool.mamba_pool, request.kv
        begin_at(pool, int(kv.mamba_pool_idx), kv.kv_committed_len)
    host(queue, decoding, *args, **kwargs)


def begin_at(pool: Any, slot: int, length: int) -> None:
    """Make empty pages that continue at a context of `length` tokens, all unread."""
    pool.pages[:, slot] = 0
    for layer_id in pool.mamba_layer_ids:
        pool.view(layer_id).span[slot] = length


@patch(
    When.ON_CPU,
    "sglang.srt.disaggregation.decode.DecodeTransferQueue.resolve_deferred_releases",
    reason="30 seconds after an abort SGLang gives memory that a prefill server may still write "
    "to another request",
    remove_when="SGLang keeps it while that server runs and has not said that it is done",
    upstream="https://github.com/sgl-project/sglang/pull/38961",
)
def hold_what_may_be_written(host: Callable[[Any], None], queue: Any) -> None:
    """Keep an aborted request's memory until the prefill server stops writing to it, or ends.

    Asks that server repeatedly: if it was restarted, it answers that it writes nothing.
    """
    now, held = time.monotonic(), queue._deferred_releases
    for i, (decoding, since, deadline, buffer, acks) in enumerate(held):
        receiver, room = decoding.kv_receiver, decoding.req.bootstrap_room
        if now < deadline or receiver.kv_mgr.is_abort_release_safe(room, acks):
            continue
        servers = receiver.kv_mgr.prefill_info_table  # those with a heartbeat
        if servers.get(receiver.bootstrap_addr) is receiver.prefill_info:
            receiver._send_abort_notification(force_arm=True)
            deadline = now + queue.deferred_kv_release_timeout
            held[i] = decoding, since, deadline, buffer, acks
    host(queue)


@patch(
    When.ON_CPU,
    "sglang.srt.managers.scheduler.Scheduler.init_disaggregation",
    reason="SGLang's NIXL backend takes the memory of KV and states for a GPU's, NIXL's thread "
    "keeps a core busy, and with AMX threads inherit the one core of the thread that computes",
    remove_when="SGLang registers memory by its device, and NIXL waits for data",
)
def beside_computation(host: Callable[[Any], None], scheduler: Any) -> None:
    """Let NIXL copy in main memory, with a thread that does not keep a core busy.

    Around `init_disaggregation`, which makes NIXL's agent. SGLang registers KV and states as VRAM,
    and only its messages as DRAM. On processors with AMX it has bound this thread to one core; here
    new threads get the cores of the parent process, which is not bound.
    """
    from sglang.srt.runtime_context import get_server_args

    if not (hands_over(get_server_args()) and is_ours(scheduler.model_config)):
        host(scheduler)
        return
    described_settings()  # hash files now, not while a request waits
    api: Any = import_module("nixl._api")
    agent = api.nixl_agent

    def of_main_memory(name: str, config: Any) -> Any:
        made = agent(name, config)
        made.nixl_mems["VRAM"] = made.nixl_mems["DRAM"]
        return made

    cores = os.sched_getaffinity(0)
    api.nixl_agent = of_main_memory
    try:
        os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
        with waiting(api.nixlBind):
            host(scheduler)
    finally:
        os.sched_setaffinity(0, cores)
        api.nixl_agent = agent
