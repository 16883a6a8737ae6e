"""What the drafter keeps of requests that draft nothing."""

import pytest
import torch

pytest.importorskip("sglang")

from qwen3next_plugin.mtp.pending import Pending, PendingTokens, Row


@pytest.fixture
def drafter(monkeypatch):
    """A drafter in steps that draft nothing, of `rids`, each of which commits one token."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from types import SimpleNamespace as Bag

    from qwen3next_plugin.engines.sglang.speculation.drafter import Drafter

    drafter = object.__new__(Drafter)
    drafter.pending = Pending()
    monkeypatch.setattr(Drafter, "_no_drafts", lambda *_: None)

    def step(at, *rids):
        tokens = PendingTokens(at, torch.zeros(1).long(), torch.zeros(1, 2))
        drafter.rows = [
            Row(request=rid, index=i, tokens=tokens, scheduled=1, continues=True)
            for i, rid in enumerate(rids)
        ]
        batch = Bag(reqs=[Bag(rid=rid) for rid in rids])
        drafter._draft_extend_for_decode(batch, Bag(next_draft_input=None))
        return drafter.pending

    return step


def test_pending_tokens_of_requests_that_ended_are_dropped(drafter):
    drafter(5, "a", "b")
    pending = drafter(6, "a", "b")
    assert [pending.count(rid) for rid in "ab"] == [2, 2]
    pending = drafter(7, "b")
    assert [pending.count(rid) for rid in "ab"] == [0, 3]
