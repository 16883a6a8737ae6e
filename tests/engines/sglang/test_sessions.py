"""Turns of streaming sessions without a radix cache, which have a prefix nevertheless."""

from types import SimpleNamespace as Bag

import pytest

pytest.importorskip("sglang")

from checkpoints import SHIPPED, random_prompt
from engines.sglang.server import FIXED, NEXTN, Forked
from qwen3next_plugin.engines.sglang.repairs.sessions import add_turn


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("before", [0, 7])
def test_a_turn_is_scheduled_as_one_that_may_end(ignores, before):
    req = Bag(sampling_params=Bag(ignore_eos=ignores), prefix_len=before)
    seen = []

    def host(adder, one, has_chunked, truncation_align_size):
        seen.append(
            (adder, one, has_chunked, truncation_align_size, one.sampling_params.ignore_eos)
        )
        return "added"

    assert add_turn(host, "adder", req, True, truncation_align_size=None) == "added"
    assert seen == [("adder", req, True, None, ignores and not before)]
    assert req.sampling_params.ignore_eos == ignores


def test_a_turn_ignores_the_end_also_if_scheduling_fails():
    req = Bag(sampling_params=Bag(ignore_eos=True), prefix_len=1)
    with pytest.raises(ZeroDivisionError):
        add_turn(lambda *_: 1 / 0, None, req)
    assert req.sampling_params.ignore_eos


@pytest.mark.serve
@pytest.mark.parametrize("drafts", [(), (*NEXTN, "3")], ids=["plain", "drafts"])
def test_a_turn_longer_than_a_chunk(drafts):
    flags = ("--dtype", "float32", "--max-total-tokens", "8192", "--disable-radix-cache")
    more = ("--enable-streaming-session", "--chunked-prefill-size", "64")
    server = Forked(SHIPPED, *flags, *more, *drafts, env=FIXED).wait()
    params = {"temperature": 0, "ignore_eos": True, "max_new_tokens": 12}

    def ask_for(ids, **place):
        return server.post("/generate", input_ids=ids, sampling_params=params, **place)[
            "output_ids"
        ]

    try:
        opened = server.post("/open_session", capacity_of_str_len=10_000, streaming=True)
        text = []
        for turn, length in enumerate((20, 150, 10, 300)):
            asked = list(random_prompt(length, seed=turn))
            answer = ask_for(asked, session_params={"id": opened})
            text += asked
            assert answer == ask_for(text)
            text += answer
    finally:
        server.close()
