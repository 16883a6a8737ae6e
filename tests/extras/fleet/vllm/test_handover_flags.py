"""Prefill and decode on two servers: refusals at start, and settings that both must share."""

import inspect
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace as Bag
from typing import Any

import msgspec
import pytest
import torch
import vllm
import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker
from vllm.distributed.kv_transfer.kv_connector.v1.ssm_conv_transfer_utils import (
    derive_mamba_conv_split,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout
from vllm.utils.network_utils import make_zmq_path
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import MambaSpec

from checkpoints import write_checkpoint
from damage import SLIGHT, slightly_changed
from engines.clients import eventually
from engines.process import free_port
from qwen3next_plugin.config import Qwen3NextConfig
from qwen3next_plugin.engines.vllm.state.pages import page_layout, page_spec
from qwen3next_plugin.extras.fleet import computed_by
from qwen3next_plugin.extras.fleet.vllm import handover, handover_flags, leases
from qwen3next_plugin.extras.fleet.vllm.handover_flags import ALIKE, LAYOUT, complete_handover

DRAFTS = {"method": "mtp", "num_speculative_tokens": 2}


@pytest.fixture
def complete(checkpoint, monkeypatch):
    """vLLM completes its configuration, as it does before it starts a worker."""
    monkeypatch.delenv(LAYOUT, raising=False)
    get_conv_state_layout.cache_clear()  # vLLM reads the variable once

    def run(
        settings: dict[str, Any] = {},  # noqa: B006
        model: Path = checkpoint,
        connector: str = "NixlConnector",
        **flags: Any,
    ):
        transfer = {
            "kv_connector": connector,
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": settings,
        }
        flags = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True} | flags
        args = EngineArgs(model=str(model), kv_transfer_config=transfer, **flags)
        return args.create_engine_config()

    yield run
    get_conv_state_layout.cache_clear()


def told(config: Any) -> str:
    return config.kv_transfer_config.kv_connector_extra_config[ALIKE]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"connector": "NixlPushConnector"}, "NixlPushConnector is not tested .*use NixlConn"),
        *(
            ({"connector": name}, f"{name}: on a CPU .* NixlConnector, and by Off.* FolderSpec")
            for name in ("DecodeBenchConnector", "SimpleCPUOffloadConnector", "OffloadingConnector")
        ),
        (
            {
                "connector": "MultiConnector",
                "settings": {
                    "connectors": [{"kv_connector": "NixlConnector", "kv_role": "kv_consumer"}]
                },
            },
            "MultiConnector: use NixlConnector alone",
        ),
        (
            {"settings": {"enforce_handshake_compat": False}},
            "enforce_handshake_compat = False: only True is served",
        ),
        ({"settings": {"bidirectional_kv_xfer": True}}, "bidirectional_kv_xfer = True: only Fal"),
        ({"enable_lora": True}, "enable_lora: NixlConnector .*serve without adapters"),
        ({"load_format": "dummy"}, "load_format = dummy: NixlConnector .*leave out --load-format"),
    ],
    ids=str,
)
def test_what_would_give_wrong_text_is_refused_by_name(complete, given, message):
    with pytest.raises(Exception, match=message):
        complete(**given)


def test_what_is_missing_is_named(complete, monkeypatch):
    monkeypatch.setattr(handover_flags.nixl_utils, "is_nixl_available", lambda: False)
    with pytest.raises(Exception, match=r"pip install 'qwen3next-plugin\[nixl\]', or leave out"):
        complete()


def test_servers_are_told_what_they_must_have_alike(monkeypatch, complete, checkpoint, tmp_path):
    copied = Path(shutil.copytree(checkpoint, tmp_path / "copy", copy_function=shutil.copyfile))
    config = complete()
    assert os.environ[LAYOUT] == "DS"
    assert told(config) == told(complete(model=copied)) == told(complete(max_model_len=256))
    assert "dtype=float32, num_speculative_tokens=0, tensor_parallel_size=1, " in told(config)
    found = [
        told(config),
        told(complete(dtype="bfloat16")),
        told(complete(speculative_config=DRAFTS)),
        told(complete(tensor_parallel_size=2)),
        told(complete(hf_overrides={"rms_norm_eps": 1e-5})),
        told(complete(model=write_checkpoint(tmp_path / "others", seed=9))),
        *(told(complete(model=slightly_changed(checkpoint, tmp_path / w, w))) for w in SLIGHT),
    ]
    for module in (computed_by, torch, vllm):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "99.1")
            complete_handover(config, Qwen3NextConfig.from_hf(config.model_config.hf_config))
        found.append(told(config))
    assert len(set(found)) == len(found)


def test_a_page_is_read_whole_and_other_states_as_vllm_does(complete):
    config = complete(speculative_config=DRAFTS)
    layout = page_layout(Qwen3NextConfig.from_hf(config.model_config.hf_config), config)
    spec = page_spec(layout, config)
    parts = handover.in_one_part(derive_mamba_conv_split, spec, 2)
    assert parts.local_conv_offsets == parts.remote_conv_offsets(0, 1) == []
    assert parts.ssm_sizes == (0, spec.page_size_bytes)
    assert spec.page_size_bytes >= layout.page_bytes
    theirs = MambaSpec(
        shapes=((96, 3), (4, 8, 8)),
        dtypes=(torch.float32, torch.float32),
        block_size=16,
        mamba_type=MambaAttentionBackendEnum.GDN_ATTN,
    )
    split = base_worker.derive_mamba_conv_split
    assert handover.in_one_part(split, theirs, 1) == split(theirs, 1)


@pytest.fixture
def prefill_server() -> Iterator[Bag]:
    """As a decode server finds it: the host's thread that answers handshakes."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import (
        NixlBaseConnectorScheduler,
    )

    ready, stop, port = Event(), Event(), free_port()
    host = inspect.unwrap(NixlBaseConnectorScheduler._nixl_handshake_listener)
    answers = {(0, 0): b"of rank 0"}
    args = (host, answers, ready, stop, "127.0.0.1", port)
    thread = Thread(target=leases.answer_about_leases, args=args)
    thread.start()
    assert ready.wait(10)
    yield Bag(host="127.0.0.1", port=port, request_id="a")
    stop.set()
    thread.join()


def read(remote: Bag) -> tuple[set[str], set[str]]:
    """What becomes of a request whose blocks have been read."""
    worker = Bag(_pending_recv_notifs={"a": []}, _recving_metadata={"a": Bag(remote=remote)})
    found = leases.ask_when_read(lambda *_: ({"a"}, set()), worker, {})
    while not found[0]:
        found = leases.ask_when_read(lambda *_: (set(), set()), worker, {})
    return found


def test_a_read_counts_while_blocks_are_kept(prefill_server, monkeypatch, caplog):
    for kept in (False, True):
        leases.keep(lambda *_, kept=kept: (kept, {}), None, Bag(request_id="a"), ())
        assert read(prefill_server) == ({"a"}, set() if kept else {"a"})
    leases.forget(lambda *_: None, None, Bag(finished_sending={"a"}))
    assert read(prefill_server) == ({"a"}, {"a"})
    assert caplog.text.count("has not kept the blocks until they were read") == 2
    monkeypatch.setattr(leases, "TIMEOUT", 50)
    dead = Bag(host="127.0.0.1", port=free_port(), request_id="a")
    assert read(dead) == ({"a"}, {"a"})
    assert "did not say whether it has kept the blocks" in caplog.text


@pytest.mark.parametrize(
    "question",
    [b"\xc1", msgspec.msgpack.encode("a rank"), msgspec.msgpack.encode(("", [0], {})), None],
    ids=["no msgpack", "one part", "ranks that are none", "one frame"],
)
def test_a_question_that_cannot_be_read_ends_nothing(prefill_server, caplog, question):
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.connect(make_zmq_path("tcp", "127.0.0.1", prefill_server.port))
        sock.send_multipart([b"", question] if question else [b""])
        assert eventually(lambda: "not a question of a decode server" in caplog.text)
    leases.keep(lambda *_: (True, {}), None, Bag(request_id="a"), ())
    assert read(prefill_server) == ({"a"}, set())
    leases.forget(lambda *_: None, None, Bag(finished_sending={"a"}))


def test_what_needs_no_read_is_done_at_once():
    """As where all is cached, or a transfer has failed."""
    worker = Bag(_pending_recv_notifs={"b": []})
    found = leases.ask_when_read(lambda *_: ({"a", "b"}, {"b"}), worker, {})
    assert found == ({"a", "b"}, {"b"})
