"""Acceptance: how likely each draft position is accepted, learned from verifications.

p_j is the chance that draft j is accepted, given that drafts 1 to j-1 were. Acceptance changes with
the text, so old observations count less.
"""

from collections.abc import Sequence

KEEP, KEEP_ALL = 0.95, 0.998  # decay of old observations at each new one: of one request, of all
FADE = 0.98  # weight that a request's observations keep in a step without drafts
SURPRISE = 6.0  # from this value on a request counts as different; ordinary text reaches 4


class Acceptance:
    """How often draft 1, 2, … was observed and accepted, old observations counting less."""

    def __init__(self, num_drafts: int, keep: float = KEEP) -> None:
        self.keep = keep
        self.seen, self.accepted = [0.0] * num_drafts, [0.0] * num_drafts
        self.tokens = 0  # produced in all

    def observe(self, drafted: int, accepted: int, steps: int = 1) -> None:
        """Count the first `accepted` of `drafted` as accepted and the next one as rejected."""
        self.tokens += steps * (1 + accepted)
        if not drafted and self.seen[0]:
            self.seen = [FADE**steps * n for n in self.seen]
            self.accepted = [FADE**steps * n for n in self.accepted]
        for j in range(min(drafted, accepted + 1)):
            self.seen[j] = self.keep * self.seen[j] + 1
            self.accepted[j] = self.keep * self.accepted[j] + (j < accepted)

    def chances(self, expected: Sequence[float], weight: float) -> list[float]:
        """p_1, p_2, …, shrunk towards `expected`, which counts as at most `weight` observations."""
        found = []
        for a, n, p in zip(self.accepted, self.seen, expected, strict=True):
            surprise = (a - n * p) ** 2 / (n * p * (1 - p) + 1)  # about 1 if `expected` is right
            pull = weight / max(1.0, surprise / SURPRISE) ** 2
            found.append((a + pull * p) / (n + pull))
        return found
