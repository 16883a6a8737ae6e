"""Leases of vLLM's NIXL connector: a decode server asks whether blocks were kept while it read.

A prefill server frees blocks that are not read in time and reuses them, perhaps while they are
read. Pages and KV do not name their request. So a decode server reads the blocks, asks whether they
were kept, and only then reports that they can be freed. The thread for handshakes, in the process
that frees blocks, answers without waiting for a step.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any

import zmq
from vllm.logger import init_logger
from vllm.utils.network_utils import make_zmq_path

from qwen3next_plugin.engines.vllm.names import LOGGER
from qwen3next_plugin.engines.vllm.patches import patch
from qwen3next_plugin.extras.fleet.vllm.groups import When

logger = init_logger(LOGGER)

LEASE = "qwen3next_plugin lease"  # replaces a rank in a handshake's question
KEPT = b"kept"
TIMEOUT = 5000  # ms, as of a handshake
PAUSE = 0.1  # seconds, after an invalid question

_kept: set[str] = set()  # on a prefill server: requests whose blocks are kept
_asked: dict[str, Future[bool]] = {}  # on a decode server, by request
_threads = ThreadPoolExecutor(4, thread_name_prefix="qwen3next_leases")


class Answers(dict[tuple[Any, Any], bytes]):
    """A handshake's answers by rank; for (LEASE, request), whether its blocks are kept."""

    def __missing__(self, key: tuple[Any, Any]) -> bytes:
        return KEPT if key[0] == LEASE and key[1] in _kept else b""


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler."
    "NixlBaseConnectorScheduler._nixl_handshake_listener",
    reason="vLLM decodes from blocks that the other server has freed and used again",
    remove_when="vLLM fails a request whose blocks were freed before they were read",
    upstream="https://github.com/vllm-project/vllm/issues/52234",
)
def answer_about_leases(
    host: Callable[..., None],
    encoded_data: dict[Any, bytes],
    ready: Event,
    stop: Event,
    *address: Any,
) -> None:
    """The scheduler's thread that answers handshakes; invalid questions do not end it."""
    while True:
        try:
            return host(Answers(encoded_data), ready, stop, *address)
        except Exception as error:
            if not ready.is_set():  # it cannot listen
                raise
            logger.warning("qwen3next_plugin: not a question of a decode server: %r", error)
            stop.wait(PAUSE)


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler."
    "NixlPullConnectorScheduler.request_finished",
    reason="vLLM decodes from blocks that the other server has freed and used again",
    remove_when="vLLM fails a request whose blocks were freed before they were read",
    upstream="https://github.com/vllm-project/vllm/issues/52234",
)
def keep(
    host: Callable[..., tuple[bool, dict[str, Any] | None]],
    scheduler: Any,
    request: Any,
    block_ids: Any,
) -> tuple[bool, dict[str, Any] | None]:
    """Whether blocks of a finished request are kept, and where another server finds them."""
    kept, params = host(scheduler, request, block_ids)
    if kept:
        _kept.add(request.request_id)
    return kept, params


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler."
    "NixlBaseConnectorScheduler.update_connector_output",
    reason="vLLM decodes from blocks that the other server has freed and used again",
    remove_when="vLLM fails a request whose blocks were freed before they were read",
    upstream="https://github.com/vllm-project/vllm/issues/52234",
)
def forget(host: Callable[[Any, Any], None], scheduler: Any, output: Any) -> None:
    """Forget requests before vLLM frees their blocks, after reading or a timeout."""
    _kept.difference_update(output.finished_sending or ())
    host(scheduler, output)


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker.NixlPullConnectorWorker."
    "_read_blocks",
    reason="vLLM decodes from blocks that the other server has freed and used again",
    remove_when="vLLM fails a request whose blocks were freed before they were read",
    upstream="https://github.com/vllm-project/vllm/issues/52234",
)
def read_without_release(
    host: Callable[..., bool],
    worker: Any,
    read_spec: Any,
    dst_engine_id: str,
    request_id: str,
    *args: Any,
    **kwargs: Any,
) -> bool:
    """Read blocks without reporting them as free; vLLM reports that when the request is done."""
    nixl = worker.nixl_wrapper
    make = nixl.make_prepped_xfer

    def silent(*given: Any, notif_msg: bytes, **more: Any) -> Any:
        agent = worker._remote_agents[dst_engine_id][0, read_spec.remote_rank]
        worker._pending_recv_notifs.setdefault(request_id, []).append((agent, notif_msg))
        return make(*given, **more)

    nixl.make_prepped_xfer = silent
    try:
        return host(worker, read_spec, dst_engine_id, request_id, *args, **kwargs)
    finally:
        nixl.make_prepped_xfer = make


@patch(
    When.HANDOVER,
    "vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker.NixlBaseConnectorWorker."
    "_pop_done_transfers",
    reason="vLLM decodes from blocks that the other server has freed and used again",
    remove_when="vLLM fails a request whose blocks were freed before they were read",
    upstream="https://github.com/vllm-project/vllm/issues/52234",
)
def ask_when_read(
    host: Callable[..., tuple[set[str], set[str]]], worker: Any, transfers: dict[str, list[int]]
) -> tuple[set[str], set[str]]:
    """Requests with their blocks read, and failed ones, including those with blocks not kept."""
    done, failed = host(worker, transfers)
    for request in (done - failed) & worker._pending_recv_notifs.keys():
        _asked[request] = _threads.submit(_was_kept, worker._recving_metadata[request].remote)
        done.remove(request)
    for request in [request for request, answer in _asked.items() if answer.done()]:
        done.add(request)
        answer = _asked.pop(request)
        if answer.exception() or not answer.result():
            failed.add(request)
            logger.error(
                "qwen3next_plugin: request %s fails: the prefill server %s; ask for the answer "
                "sooner, or set a longer kv_lease_duration there (30 seconds by default)",
                *(request, _why(answer)),
            )
    return done, failed


def _was_kept(remote: Any) -> bool:
    """Whether the prefill server still keeps the request's blocks."""
    # Imported late, with vLLM's connector, which few servers use.
    import msgspec
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import GET_META_MSG
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.utils import zmq_ctx

    with zmq_ctx(zmq.REQ, make_zmq_path("tcp", remote.host, remote.port)) as sock:
        sock.setsockopt(zmq.RCVTIMEO, TIMEOUT)
        sock.send(msgspec.msgpack.encode((GET_META_MSG, LEASE, remote.request_id)))
        return sock.recv_multipart()[0] == KEPT


def _why(answer: Future[bool]) -> str:
    if error := answer.exception():
        return f"did not say whether it has kept the blocks until they were read ({error})"
    return "has not kept the blocks until they were read"
