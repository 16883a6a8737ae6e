"""The draft vocabulary: each token once, added tokens always, and recently seen tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen3next_plugin.mtp.vocabulary import TAIL, DraftVocabulary

VOCAB, SIZE = 4096, 1200


@pytest.mark.parametrize("size", [VOCAB, 5000])
def test_all_of_a_small_vocabulary(size):
    vocabulary = DraftVocabulary(VOCAB, size)
    assert vocabulary.ids.tolist() == list(range(VOCAB))
    assert not len(vocabulary.see(torch.arange(VOCAB)))


def test_first_and_last_until_something_is_seen():
    ids = DraftVocabulary(VOCAB, SIZE).ids.tolist()
    assert sorted(ids) == [*range(SIZE - TAIL), *range(VOCAB - TAIL, VOCAB)]


def test_only_what_is_new_changes_anything():
    vocabulary = DraftVocabulary(VOCAB, SIZE)
    assert not len(vocabulary.see(torch.tensor([0, 5, VOCAB - 1])))
    changed = vocabulary.see(torch.tensor([5, 3000, 3000, 2000]))
    assert sorted(vocabulary.ids[changed].tolist()) == [2000, 3000]
    assert not len(vocabulary.see(torch.tensor([2000, 3000])))


def test_more_at_once_than_there_are_places():
    vocabulary = DraftVocabulary(VOCAB, SIZE)
    assert len(vocabulary.see(torch.arange(VOCAB))) == SIZE // 2
    assert len(vocabulary.ids.unique()) == SIZE


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=400), max_size=12))
def test_each_once_and_what_is_new_among_them(steps):
    vocabulary = DraftVocabulary(VOCAB, SIZE)
    always = vocabulary.ids[: vocabulary.first_place].clone()
    for tokens in steps:
        new = set(tokens) - set(vocabulary.ids.tolist())
        before = vocabulary.ids.clone()
        changed = vocabulary.see(torch.tensor(tokens, dtype=torch.int64))
        ids = vocabulary.ids
        assert changed.sort().values.tolist() == (ids != before).nonzero().squeeze(1).tolist()
        assert len(changed) == len(new)
        assert len(ids.unique()) == len(ids) == SIZE
        assert torch.equal(ids[: vocabulary.first_place], always)
        assert new <= set(ids.tolist())  # a step's tokens are fewer than the places
