"""Prefill on one server and decode on another: the text of one server, and its pages."""

import signal
import urllib.error
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest

from checkpoints import random_prompt
from engines.clients import PROMPTS, eventually
from engines.server import closing, most_cores
from engines.vllm.server import Server
from extras.fleet.handover import check_slight_changes_are_refused, differences
from extras.fleet.vllm.apart import DRAFTS, apart, complete, prefill, server, text
from needs import needs
from tiers import long_except

pytestmark = pytest.mark.serve

SEEDED = {"temperature": 0.9, "seed": 7, "top_p": 0.95}


@pytest.fixture(scope="module")
def servers() -> Iterator[list[Server]]:
    with closing(server("kv_producer"), server("kv_consumer")) as both:
        yield both


def block_size(server: Server) -> int:
    (size,) = server.by_label("vllm:cache_config_info", "block_size")
    return int(size)


def handed_over(server: Server) -> float:
    """Tokens of prompts that another server has computed."""
    return server.metrics()["vllm:external_prefix_cache_hits_total"]


def contents(server: Server, blocks: list[int] | None = None) -> list[list[str]]:
    """Of each region a digest of each block, by default of all."""
    args = [] if blocks is None else [blocks]
    (found,) = server.post("/collective_rpc", method="blocks", args=args)["results"]
    return found


def alone(server: Server, prompt: str | tuple[int, ...], **options) -> str:
    """What one server answers that finds nothing in its cache."""
    return text(complete(server, prompt, cache_salt="alone", **options))


@pytest.mark.parametrize(
    "options", [pytest.param({}, marks=pytest.mark.long), SEEDED], ids=["greedy", "seeded"]
)
def test_the_text_is_one_servers(servers, options):
    """Of prompts that end before, at and after a block's end."""
    block, seed = block_size(servers[0]), len(options)
    lengths = (1, 2, 3, 9, block - 1, block, block + 1, block + 2, 2 * block + 40)
    for prompt in [random_prompt(length, seed=40 + seed) for length in lengths]:
        before = handed_over(servers[1])
        found = text(apart(*servers, prompt, **options))
        assert handed_over(servers[1]) - before == max(1, len(prompt) - 1), len(prompt)
        assert found == alone(servers[1], prompt, **options), len(prompt)


def test_many_at_once_with_drafts(servers):
    before = servers[1].metrics()["vllm:spec_decode_num_accepted_tokens_total"]
    with ThreadPoolExecutor(len(PROMPTS)) as clients:
        found = list(clients.map(lambda prompt: text(apart(*servers, prompt)), PROMPTS))
    after = servers[1].metrics()["vllm:spec_decode_num_accepted_tokens_total"]
    assert found == [alone(servers[1], prompt) for prompt in PROMPTS]
    assert after - before > len(PROMPTS)


def test_pages_and_blocks_are_copied_byte_for_byte(servers):
    """Of a prompt whose first part fills its blocks, so that decoding writes to others."""
    prompt = random_prompt(2 * block_size(servers[0]) + 1, seed=44)
    where = prefill(servers[0], prompt)
    numbers = [block for group in where["remote_block_ids"] for block in group]
    written = contents(servers[0], numbers)
    complete(servers[1], prompt, kv_transfer_params=where)
    there = contents(servers[1])
    assert len(numbers) > len(where["remote_block_ids"]) > 1  # of attention, and of pages
    for region, (mine, theirs) in enumerate(zip(written, there, strict=True)):
        assert set(filter(None, mine)) <= set(theirs), region
    assert all(any(region) for region in written)


def test_a_conversation_goes_on_from_its_own_cache(servers):
    """The second turn hands over only what the decoding server has not cached."""
    first = random_prompt(2 * block_size(servers[0]) + 9, seed=45)
    answer = apart(*servers, first, return_token_ids=True)
    second = (*first, *answer["choices"][0]["token_ids"], *random_prompt(20, seed=46))
    before = handed_over(servers[1])
    found = text(apart(*servers, second))
    assert 0 < handed_over(servers[1]) - before < len(second) - block_size(servers[0])
    assert found == alone(servers[1], second)


def test_servers_that_wait_leave_the_cores_to_others(servers):
    """NIXL's thread would keep one busy in each."""
    apart(*servers, PROMPTS[0])
    assert most_cores(servers) < 0.1


@needs("two-cores")
@pytest.mark.long
def test_two_ranks_hand_over_to_two():
    ranks = {"--tensor-parallel-size": "2"}
    with closing(server("kv_producer", **ranks), server("kv_consumer", **ranks)) as both:
        for prompt in [random_prompt(length, seed=51) for length in (9, 300)]:
            assert text(apart(*both, prompt)) == alone(both[1], prompt)
        assert handed_over(both[1]) == 8 + 299


@pytest.mark.parametrize("policy", long_except(["fail"], ["fail", "recompute"]))
def test_a_dead_prefill_server_costs_its_requests_only(servers, policy):
    """They are errors, or are computed where they are decoded, as vLLM's policy says."""
    prompt = random_prompt(200, seed=47)
    with ExitStack() as stack:
        (first,) = stack.enter_context(closing(server("kv_producer")))
        second = servers[1]  # vLLM's own policy is "fail"
        if policy != "fail":
            other = server("kv_consumer", kv_load_failure_policy=policy)
            (second,) = stack.enter_context(closing(other))
        expected = alone(second, prompt)
        known = [prefill(first, prompt), prefill(first, random_prompt(90, seed=48))]
        assert text(complete(second, random_prompt(90, seed=48), kv_transfer_params=known[1]))
        known[1] = prefill(first, prompt)
        first.process.stop(signal.SIGKILL)
        for where in known:
            if policy == "recompute":
                assert text(complete(second, prompt, kv_transfer_params=where)) == expected
                continue
            with pytest.raises(urllib.error.HTTPError) as refusal:
                complete(second, prompt, kv_transfer_params=where)
            assert refusal.value.code == 500
        assert alone(second, prompt) == expected
        assert second.healthy()


def used_again(first: Server, where: dict[str, Any]) -> bool:
    """Let other requests, as long, use the blocks of one that the first server has not kept."""
    pages = [group[0] for group in where["remote_block_ids"][:-1]]
    before = contents(first, pages)
    others = (random_prompt(300, seed=seed) for seed in count(1000))

    def have_changed() -> bool:
        complete(first, next(others), 1)
        return contents(first, pages) != before

    return eventually(have_changed)


def check_not_read(both: Sequence[Server], prompt: tuple[int, ...], where: dict[str, Any]) -> None:
    """The request fails, with a line that says why, and nothing else does."""
    with pytest.raises(urllib.error.HTTPError) as refusal:
        complete(both[1], prompt, kv_transfer_params=where, cache_salt="again")
    assert refusal.value.code == 500
    assert "prefill server has not kept the blocks" in both[1].process.text()
    assert text(apart(*both, prompt)) == alone(both[1], prompt)


def test_blocks_that_another_request_has_by_then_are_not_read(servers):
    """Asked for twice: they are free once they are read."""
    prompt = random_prompt(300, seed=52)
    where = prefill(servers[0], prompt)
    complete(servers[1], prompt, kv_transfer_params=where)
    assert used_again(servers[0], where)
    check_not_read(servers, prompt, where)


@pytest.mark.long
def test_blocks_that_expire_before_they_are_read_are_not_read():
    lease = {"kv_connector_extra_config": {"kv_lease_duration": 6}}
    with closing(server("kv_producer", **lease), server("kv_consumer")) as both:
        prompt = random_prompt(300, seed=52)
        where = prefill(both[0], prompt)
        assert used_again(both[0], where)
        check_not_read(both, prompt, where)


@pytest.mark.parametrize(
    ("named", "differs"),
    [
        ("num_speculative_tokens", {"drafts": DRAFTS - 1}),
        ("dtype", {"--dtype": "bfloat16"}),
        ("page_bytes", {"--mamba-ssm-cache-dtype": "bfloat16"}),
        pytest.param(
            *("tensor_parallel_size", {"--tensor-parallel-size": "2"}), marks=needs("two-cores")
        ),
    ],
    ids=str,
)
@pytest.mark.long
def test_servers_that_are_not_alike_exchange_nothing(named, differs):
    with closing(server("kv_producer", **differs), server("kv_consumer")) as both:
        prompt = random_prompt(200, seed=49)
        with pytest.raises(urllib.error.HTTPError):
            apart(*both, prompt)
        assert alone(both[1], prompt)
        log = both[1].process.text()
    assert named in differences(log)


@pytest.mark.long
def test_weights_that_differ_slightly_are_refused(tmp_path):
    check_slight_changes_are_refused(
        tmp_path,
        lambda model: server("kv_producer", model=model),
        lambda model: server("kv_consumer", model=model),
        lambda first, second: apart(first, second, random_prompt(200, seed=49)),
    )
