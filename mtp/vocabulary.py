"""Which tokens a drafter may draft: the first of the vocabulary, its end, and what was seen.

The trunk verifies with the whole head, so a token that is left out costs acceptance, never the
output. Ids of a byte-pair encoding are in the order of their merges, roughly that of frequency in
the tokenizer's own corpus; what a server is asked is another matter, so half of the places follow
the tokens that pass through it.
"""

import torch

TAIL = 512  # added tokens and padding come last: Qwen's are the last 293 of 151,936


class DraftVocabulary:
    """`size` token ids, or the whole vocabulary where it is no larger.

    `ids` [size] int32, each id once. Tokens that are seen and not among them take the places of
    those that were taken in longest ago.
    """

    def __init__(self, vocab_size: int, size: int) -> None:
        if size >= vocab_size:
            self.first_place, self.ids = vocab_size, torch.arange(vocab_size, dtype=torch.int32)
        else:
            self.first_place = size // 2  # of those that follow what is seen
            self.ids = torch.cat(
                [
                    torch.arange(self.first_place - TAIL),
                    torch.arange(vocab_size - TAIL, vocab_size),
                    torch.arange(self.first_place - TAIL, size - TAIL),
                ]
            ).int()
        self._known = torch.zeros(vocab_size, dtype=torch.bool)
        self._known[self.ids] = True
        self._next = 0  # place, behind the first, that is taken next

    def see(self, token_ids: torch.Tensor) -> bool:
        """Take in tokens [T] of a step, all that fit; whether `ids` changed."""
        places = len(self.ids) - self.first_place
        new = token_ids[~self._known[token_ids]].unique()[:places]
        if not len(new):
            return False
        taken = self.first_place + (self._next + torch.arange(len(new))) % places
        self._known[self.ids[taken]] = False
        self._known[new] = True
        self.ids[taken] = new.int()
        self._next = (self._next + len(new)) % places
        return True
