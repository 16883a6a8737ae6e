"""Where the files of a prefix begin and end: prefixes that share tokens share files."""

from hashlib import sha256
from itertools import pairwise

import pytest

from qwen3next_plugin.engines.sglang.state.folder_linker import CUT, EVERY, pieces

KEYS = [sha256(str(i).encode()).hexdigest() for i in range(20 * EVERY)]
CUTS = [i for i, key in enumerate(KEYS, 1) if key.startswith(CUT)]


def test_a_file_has_as_many_tokens_as_said():
    assert 0.7 * EVERY < len(KEYS) / len(CUTS) < 1.4 * EVERY


@pytest.mark.parametrize("end", [1, EVERY, CUTS[3] - 1, CUTS[3], CUTS[3] + 1, len(KEYS)])
def test_files_follow_each_other_and_all_but_the_last_are_those_of_a_longer_prefix(end):
    found = list(pieces(KEYS[:end]))
    assert (found[0][0], found[-1][1]) == (0, end)
    assert all(before[1] == after[0] for before, after in pairwise(found))
    assert found[:-1] == list(pieces(KEYS))[: len(found) - 1]


@pytest.mark.parametrize("begin", [1, CUTS[2] - 1, CUTS[2], CUTS[2] + 1])
def test_what_follows_a_part_ends_where_the_whole_does(begin):
    """Only the first file may begin before the part."""
    found = [end + begin for _, end in pieces(KEYS[begin:])]
    assert found == [end for _, end in pieces(KEYS) if end > begin]
