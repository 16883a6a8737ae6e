"""Which tokens are drafted: each once, in order, added tokens always among them."""

import pytest
import torch

from qwen3next_plugin.mtp.draft_vocabulary import TAIL, draft_vocabulary, rows_of_shard


@pytest.mark.parametrize("limit", [None, 4096, 5000])
def test_all(limit):
    assert draft_vocabulary(4096, limit).tolist() == list(range(4096))


@pytest.mark.parametrize("limit", [TAIL + 1, 2001, 4095])
def test_first_and_last(limit):
    ids = draft_vocabulary(4096, limit).tolist()
    assert len(ids) == limit
    assert ids == sorted(set(ids))
    assert ids[: limit - TAIL] == list(range(limit - TAIL))
    assert ids[-TAIL:] == list(range(4096 - TAIL, 4096))


def test_refuses_an_end_without_a_beginning():
    with pytest.raises(ValueError, match="draft vocabulary of 512 tokens is too small"):
        draft_vocabulary(4096, TAIL)


def test_shards_hold_every_id_once():
    ids = draft_vocabulary(4096, 1500)
    bounds = (0, 100, 1365, 2730, 4096)
    shards = [rows_of_shard(ids, *bounds[i : i + 2]) for i in range(len(bounds) - 1)]
    assert torch.equal(torch.cat(shards), ids)
    assert len(shards[2]) == 0
