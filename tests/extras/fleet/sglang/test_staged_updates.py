"""Weights that are sent to a server in calls: loaded together at the end, or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.process import free_port
from engines.sglang.server import Server
from extras.fleet.other_weights import PROMPTS, WRONG, write
from extras.fleet.sglang.updating import (
    UPDATE,
    answers,
    during,
    packed,
    post,
    read,
    refused,
    send,
    session,
    start,
    stored,
)

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    return [write(tmp_path_factory.mktemp(f"seed-{seed}"), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(folders) -> Iterator[Server]:
    server = start(folders[0])
    yield server
    server.close()


@pytest.fixture(scope="module")
def fresh(server, folders) -> list:
    """Answers by the second checkpoint."""
    read(server, folders[1])
    found = answers(server)
    read(server, folders[0])
    assert answers(server) != found
    server.forget()
    return found


@pytest.fixture
def by_name() -> Iterator[None]:
    """Share memory by names: descriptors go to processes of the same family only."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(before)


def test_one_bucket_in_shared_memory(server, folders, fresh, by_name):
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=stored(folders[1]))
    flat = bucket.get_flattened_tensor()
    whole = {"flattened_tensor": flat, "metadata": bucket.get_metadata()}
    payload = packed(whole, MultiprocessingSerializer.serialize)
    with session(server):
        sent = {"serialized_named_tensors": [payload], "load_format": "flattened_bucket"}
        post(server, UPDATE, **sent, weight_version="two")
        flat.zero_()  # the call is over: the memory is the sender's again
    assert answers(server) == fresh
    assert '"weight_version":"two"' in server.get("/model_info")
    read(server, folders[0])


def test_a_broadcast(server, folders, fresh):
    from sglang.srt.utils import init_custom_process_group
    from torch.distributed import broadcast, destroy_process_group

    tensors = stored(folders[1])
    port = free_port()
    there = {"master_address": "127.0.0.1", "master_port": port, "backend": "gloo"}
    named = {"world_size": 2, "group_name": "of two"}
    with during(server, "/init_weights_update_group", rank_offset=1, **named, **there):
        group = init_custom_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=0, **named)
    body = {
        "group_name": "of two",
        "names": [name for name, _ in tensors],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }
    with session(server), during(server, "/update_weights_from_distributed", **body):
        for _, tensor in tensors:
            broadcast(tensor, src=0, group=group)
    post(server, "/destroy_weights_update_group", group_name="of two")
    destroy_process_group(group)
    assert answers(server) == fresh
    read(server, folders[0])


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_tensors_leave_the_old_weights(server, folders, tmp_path, wrong):
    before = server.greedy(PROMPTS, 24)
    post(server, "/begin_weight_update")
    payload = packed(stored(wrong.write(folders[1], tmp_path)))
    post(server, UPDATE, serialized_named_tensors=[payload], weight_version="new")
    message = refused(server, "/end_weight_update")
    assert wrong.message in message
    assert "the old weights stay, give their version to /update_weight_version" in message
    server.forget()
    assert server.greedy(PROMPTS, 24) == before
    assert "no weight-update session is open" in refused(server, "/end_weight_update")


def test_what_cannot_be_read_is_not_part_of_a_session(server, folders, fresh):
    tensors = stored(folders[1])
    post(server, "/begin_weight_update")
    assert "already open" in refused(server, "/begin_weight_update")
    for payload, options, said in (
        (packed(b"no pickle", bytes), {}, "invalid load key"),
        (packed(Path("/")), {}, "Blocked unsafe global"),
        (packed([("lm_head.weight", 3)]), {}, "names and tensors are expected"),
        (packed(tensors), {"load_format": "direct"}, "load_format = direct: leave"),
        (packed(tensors), {"selector": "draft"}, "the session began with all"),
    ):
        assert said in refused(server, UPDATE, serialized_named_tensors=[payload], **options)
    twice = [(name, tensor * 2) for name, tensor in tensors]
    for again in (twice, tensors):
        post(server, UPDATE, serialized_named_tensors=[packed(again)])
    post(server, "/end_weight_update")
    assert answers(server) == fresh
    read(server, folders[0])


def test_no_tensors_come_outside_of_a_session(server):
    said = refused(server, UPDATE, serialized_named_tensors=[packed([])])
    assert "must run between begin_weight_update() and end_weight_update()" in said
    assert "selector = draft" in refused(server, "/begin_weight_update", selector="draft")


def test_the_trunk_alone(server, folders):
    """Its text is that of the new weights; the old MTP layer drafts, by the new head."""
    trunk = [(name, tensor) for name, tensor in stored(folders[1]) if not name.startswith("mtp.")]
    read(server, folders[1])
    tokens = [one.token_ids for one in server.greedy(PROMPTS, 24)]
    read(server, folders[0])
    with session(server, selector="target"):
        post(server, UPDATE, serialized_named_tensors=[packed(trunk)])
    assert [one.token_ids for one in server.greedy(PROMPTS, 24)] == tokens
    read(server, folders[0])


def test_without_flush_cache_a_prefix_stays(server, folders):
    turn = (*PROMPTS[-1], *server.greedy([PROMPTS[-1]], 24)[0].token_ids, 5)
    with session(server):
        payload = packed(stored(folders[1]))
        post(server, UPDATE, serialized_named_tensors=[payload], flush_cache=False)
    assert server.greedy([turn], 1)[0].cached
    send(server, folders[0])
    assert not server.greedy([turn], 1)[0].cached
