"""Draft vocabulary: the tokens that a draft may be.

It has the first tokens of the vocabulary, the last ones, and those seen most recently. A token that
is missing costs acceptance and never changes the output, because verification uses the full head.
Ids of a byte-pair encoding are in the order of its merges, roughly by frequency in the tokenizer's
corpus. A server's traffic differs from that corpus, so half of the places follow the traffic.
"""

import torch

TAIL = 512  # last ids that are always included: added tokens and padding, 293 in Qwen's vocabulary


class DraftVocabulary:
    """`size` token ids, or the whole vocabulary if it is not larger.

    `ids` [size] int32 holds each id once. A new token replaces the one that was added longest ago.
    """

    def __init__(self, vocab_size: int, size: int) -> None:
        if size >= vocab_size:
            self.first_place, self.ids = vocab_size, torch.arange(vocab_size, dtype=torch.int32)
        else:
            self.first_place = size // 2  # the places from here on follow the traffic
            self.ids = torch.cat(
                [
                    torch.arange(self.first_place - TAIL),
                    torch.arange(vocab_size - TAIL, vocab_size),
                    torch.arange(self.first_place - TAIL, size - TAIL),
                ]
            ).int()
        self._known = torch.zeros(vocab_size, dtype=torch.bool)
        self._known[self.ids] = True
        self._next = 0  # the next place to replace, counted from first_place

    def see(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Add tokens of a step, as many as there are places; returns which of `ids` changed.

        Shapes: token_ids [T], returns [R] int64
        """
        places = len(self.ids) - self.first_place
        if not places:  # it has every token
            return token_ids.new_empty(0)
        new = token_ids[~self._known[token_ids]].unique()[:places]
        if not len(new):
            return new
        replaced = self.first_place + (self._next + torch.arange(len(new))) % places
        self._known[self.ids[replaced]] = False
        self._known[new] = True
        self.ids[replaced] = new.int()
        self._next = (self._next + len(new)) % places
        return replaced
