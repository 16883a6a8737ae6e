"""Prefill on one server and decode on another: the bits of one server, and what may go wrong."""

import signal
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from checkpoints import SHIPPED, random_prompt
from engines.checks import check_greedy
from engines.clients import eventually
from engines.routers import opening, routed, turn
from engines.server import closing, most_cores
from engines.sglang.server import FIXED, NEXTN, Forked, Server
from engines.traffic import source_tokens
from extras.fleet.handover import check_slight_changes_are_refused, differences
from extras.fleet.sglang.apart import (
    CHUNK,
    FLAGS,
    INVARIANT,
    WITH_DRAFTS,
    Part,
    alone,
    apart,
    ask,
    bits,
    rooms,
)
from extras.fleet.sglang.updating import refused
from needs import needs

pytestmark = pytest.mark.serve

LENGTHS = (1, 2, 3, 4, 5, 8, 9, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 40)
TEXTS = [tuple(source_tokens()[start : start + n]) for start, n in ((0, 20), (300, 90), (900, 400))]
FP32 = ("--dtype", "float32", *WITH_DRAFTS)
PARTS = ("prefill", "decode")
NO_HOST = "2.2.2.2"  # names no prefill server: SGLang's own requests have it
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Part]]:
    with closing(*(Part(mode, *WITH_DRAFTS) for mode in PARTS)) as both:
        yield both


@pytest.fixture(scope="module")
def one() -> Iterator[Server]:
    """A server that has both parts."""
    with closing(Forked(SHIPPED, *FLAGS, *WITH_DRAFTS, env=FIXED | INVARIANT)) as (server,):
        yield server


def test_the_bits_are_one_servers(servers, one):
    """Of prompts that end in a cell of the state, in a chunk, and at their ends."""
    for prompt in [random_prompt(length, seed=40) for length in LENGTHS]:
        assert bits(apart(*servers, [prompt])) == bits(alone(one, [prompt])), len(prompt)


def test_many_at_once_with_as_many_good_drafts(servers, one):
    """The MTP layer has read the prompts where they were read."""
    prompts = [*TEXTS, *(text[5:] for text in TEXTS)]
    found, expected = apart(*servers, prompts), alone(one, prompts)
    assert bits(found) == bits(expected)
    accepted, of_one = (sum(each.accepted for each in part) for part in (found, expected))
    assert accepted >= 0.9 * of_one > len(prompts)


@pytest.mark.parametrize(
    ("flags", "more"),
    [pytest.param((), {}, marks=pytest.mark.long), (WITH_DRAFTS, {"QWEN3NEXT_DRAFTS": "adaptive"})],
    ids=["none", "adaptive"],
)
def test_without_drafts_and_with_as_many_as_pay(one, flags, more):
    with closing(*(Part(mode, *flags, env=INVARIANT | more) for mode in PARTS)) as both:
        for prompt in (*TEXTS, random_prompt(9, seed=41)):
            assert bits(apart(*both, [prompt])) == bits(alone(one, [prompt]))


def test_a_conversation_goes_on_from_the_prefill_servers_cache(servers, one):
    first = random_prompt(CHUNK + 9, seed=42)
    (answer,) = apart(*servers, [first])
    second = (*first, *answer.token_ids, *random_prompt(20, seed=43))
    (found,) = apart(*servers, [second])
    assert len(first) <= found.cached < len(second)
    assert bits([found]) == bits(alone(one, [second]))


def test_what_sglang_asks_by_itself_is_answered(servers, one):
    """Requests that no other server has a part of: those for its health."""
    for server in servers:
        server.get("/health_generate")
    assert bits(apart(*servers, TEXTS[:1])) == bits(alone(one, TEXTS[:1]))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"bootstrap_room": room} for room in (0, -1, 2**63, None)),
        *({"bootstrap_host": host} for host in ("", None, NO_HOST)),
    ],
    ids=str,
)
def test_requests_that_would_end_or_block_a_server_are_refused(servers, wrong):
    for server in servers:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(server, TEXTS[:1], **(rooms(servers[0]) | wrong))
        assert refusal.value.code == 400
        server.get("/health_generate")  # /ready does not ask the scheduler


def test_a_room_that_is_in_use_is_refused(servers):
    """By either server; the first request that has it is answered."""
    for asked, other in (servers, reversed(servers)):
        where = rooms(servers[0])
        with ThreadPoolExecutor(1) as client:
            first = client.submit(ask, asked, TEXTS[:1], **where)
            assert eventually(asked.unfinished)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                ask(asked, TEXTS[:1], **where)
            assert refusal.value.code == 400
            ask(other, TEXTS[:1], **where)
            assert first.result()


def test_other_weights_are_refused(servers):
    for server in servers:
        message = refused(server, "/update_weights_from_disk", model_path=str(SHIPPED))
        assert "serve without --disaggregation-mode" in message


def test_servers_that_wait_leave_the_cores_to_others(servers):
    """NIXL's thread would keep one busy in each."""
    apart(*servers, TEXTS[:1])
    assert eventually(lambda: not any(each.unfinished() for each in servers))
    assert most_cores(servers) < 0.1


@needs("two-cores")
@pytest.mark.long
def test_two_ranks_hand_over_to_two(reference):
    flags = (*FP32, "--tp-size", "2")
    with closing(Part("prefill", *flags, env={}), Part("decode", *flags, env={})) as both:
        found = [answer for text in TEXTS for answer in apart(*both, [text])]
    check_greedy(reference(SHIPPED), TEXTS, found)


@pytest.mark.long
def test_a_request_that_makes_room_for_others_goes_on(servers, one):
    """The decode server puts pages and KV aside, and back, also in the middle of a draft."""
    decode = Part("decode", *WITH_DRAFTS, "--enable-metrics", env=INVARIANT | RETRACT)
    prompts = [*TEXTS, *(text[3:] for text in TEXTS)]
    with closing(decode) as (second,):
        found, expected = apart(servers[0], second, prompts, 64), alone(one, prompts, 64)
        assert bits(found) == bits(expected)
        # It does not draft from KV of the MTP layer that is gone.
        accepted, of_one = (sum(each.accepted for each in part) for part in (found, expected))
        assert 0 < accepted <= of_one
        assert second.metrics()["sglang:num_retracted_requests_total"] > 0


@pytest.mark.long
def test_penalties_outlive_room_that_is_made_for_others(one):
    """Without drafts, too; and so does the least number of tokens."""
    params = {"temperature": 0, "max_new_tokens": 64, "min_new_tokens": 64}
    params |= {"frequency_penalty": 0.7, "repetition_penalty": 1.1}
    decode = Part("decode", "--enable-metrics", env=INVARIANT | RETRACT)
    with closing(Part("prefill"), decode) as both:
        found = apart(*both, TEXTS, sampling_params=params)
        assert both[1].metrics()["sglang:num_retracted_requests_total"] > 0
    assert bits(found) == bits(alone(one, TEXTS, sampling_params=params))


def test_a_dead_prefill_server_costs_its_requests_only(servers, one):
    second = servers[1]
    with closing(Part("prefill", *WITH_DRAFTS)) as (first,):
        apart(first, second, TEXTS[:1])
        where = rooms(first)
        first.process.stop(signal.SIGKILL)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(second, TEXTS[:1], **where)
        assert refusal.value.code == 500
        second.get("/health_generate")
        assert bits(apart(servers[0], second, TEXTS)) == bits(alone(one, TEXTS))


@pytest.mark.parametrize(
    ("named", "differs"),
    [
        ("speculative_num_steps", (*NEXTN, "2")),
        ("dtype", ("--dtype", "bfloat16")),
        ("page_bytes", ("--mamba-ssm-dtype", "bfloat16")),
        pytest.param("tp_size", ("--tp-size", "2"), marks=needs("two-cores")),
    ],
    ids=str,
)
@pytest.mark.long
def test_servers_that_are_not_alike_exchange_nothing(named, differs):
    patience = {"SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "5"}
    first = Part("prefill", *FP32, *differs, env=patience)
    with closing(first, Part("decode", *FP32, env={})) as (first, second):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            apart(first, second, TEXTS[:1])
        assert refusal.value.code == 500
        log = second.process.text()
        second.get("/health_generate")
    assert named in differences(log)


@pytest.mark.long
def test_weights_that_differ_slightly_are_refused(tmp_path):
    check_slight_changes_are_refused(
        tmp_path,
        lambda model: Part("prefill", *WITH_DRAFTS, model=model),
        lambda model: Part("decode", *WITH_DRAFTS, model=model),
        lambda first, second: apart(first, second, TEXTS[:1]),
    )


@needs("router")
@pytest.mark.long
def test_sglangs_router_asks_both(servers):
    first, second = servers
    how = ("--prefill", first.address, str(first.bootstrap), "--decode", second.address)
    with routed(servers, "--pd-disaggregation", *how) as client:
        talk = opening(0)
        for _ in range(2):
            read, _ = turn(client, second.model, talk)
            assert read
