"""Who leaves takes the request of this name with it, wherever it waits or runs."""

from itertools import chain
from types import SimpleNamespace as Bag

import pytest

from qwen3next_plugin.engines.sglang.pacing import Turns
from qwen3next_plugin.extras.host_fixes.sglang.aborts import abort_one

PLACES = {
    "null": ["chunked", "aside", "waiting", "grammar", "running"],
    "prefill": ["chunked", "waiting", "grammar", "running", "bootstrap", "inflight"],
    "decode": ["waiting", "grammar", "running", "prealloc", "transfer", "retracted"],
}


def scheduler(mode, place, requests):
    """A scheduler with requests in one place; in two of a decode server's they have entries."""
    from sglang.srt.disaggregation.utils import DisaggregationMode

    held = {name: [] for name in chain.from_iterable(PLACES.values())} | {place: requests}
    entries = {name: [Bag(req=req) for req in held[name]] for name in ("prealloc", "transfer")}
    turns = Turns.__new__(Turns)
    turns.aside = held["aside"]
    return Bag(
        qwen3next_turns=turns,
        disaggregation_mode=DisaggregationMode(mode),
        chunked_req=next(iter(held["chunked"]), None),
        waiting_queue=held["waiting"],
        grammar_manager=Bag(grammar_queue=held["grammar"]),
        collect_inflight_reqs=lambda: held["running"],
        disagg_prefill_bootstrap_queue=Bag(queue=held["bootstrap"]),
        disagg_prefill_inflight_queue=held["inflight"],
        disagg_decode_prealloc_queue=Bag(
            queue=entries["prealloc"], retracted_queue=held["retracted"]
        ),
        disagg_decode_transfer_queue=Bag(queue=entries["transfer"]),
    )


@pytest.mark.parametrize(
    ("mode", "place"), [(mode, place) for mode, places in PLACES.items() for place in places]
)
def test_only_the_request_of_the_whole_name_is_aborted(mode, place):
    names = ["job-12", "job-1", "job-123", "other"][: 1 if place == "chunked" else None]
    requests, seen = [Bag(rid=name) for name in names], []

    def host(_, asked):
        seen.extend(req.rid for req in requests if req.rid.startswith(asked.rid))

    for asked in ("job-1", "job"):
        abort_one(host, scheduler(mode, place, requests), Bag(rid=asked, abort_all=False))
    assert seen == [name for name in names if name == "job-1"]
    assert [req.rid for req in requests] == names
