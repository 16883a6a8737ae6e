"""Acceptance: how likely each draft position is accepted, learned from verifications.

p_j is the chance that draft j is accepted, given that drafts 1 to j-1 were. Every estimate is a
running mean that forgets old observations, because acceptance changes with the text.
"""

from collections.abc import Iterator, Sequence

PRIOR = 0.8  # acceptance before anything was observed
KEEP, KEEP_ALL = 0.95, 0.998  # weight that older observations keep: of one request, of all requests
FADE = 0.98  # weight that observations keep in a step that adds none
CHAIN = 5.0  # weight, in observations, of the estimate of the position before
PULL = 16.0  # weight, in observations, of all requests in the estimate of one request


class Acceptance:
    """Acceptance of draft 1, 2, …, as one running mean for each position.

    The weight of a mean is the number of observations that it still counts. A step that observes
    the position multiplies the weight by `keep` and adds one; a step that does not multiplies it
    by FADE.
    """

    def __init__(self, max_draft: int, keep: float, least: float) -> None:
        """`least`: the lowest weight that an observation is averaged with."""
        self.keep, self.least = keep, least
        self.means = [PRIOR] * max_draft
        self._weights = [least] * max_draft
        self._seen = [0] * max_draft  # step of the last observation

    def observe(self, drafted: int, accepted: int, now: int) -> None:
        """Count the first `accepted` of `drafted` as accepted and the next one as rejected."""
        for j in range(min(drafted, accepted + 1)):
            weight = self.weight(j, now)
            if now != self._seen[j]:
                weight = max(self.least, self.keep * weight)
            self.means[j] += ((j < accepted) - self.means[j]) / (weight + 1)
            self._weights[j], self._seen[j] = weight + 1, now

    def weight(self, j: int, now: int) -> float:
        """Observations that the mean of position `j` still counts in step `now`."""
        idle = now - self._seen[j] - 1
        return self._weights[j] * FADE**idle if idle > 0 else self._weights[j]

    def estimates(self, now: int) -> Iterator[float]:
        """The mean of each position, weighted with the estimate of the position before."""
        before = self.means[0]
        for j, mean in enumerate(self.means):
            before = mean + (before - mean) * CHAIN / (self.weight(j, now) + CHAIN)
            yield before

    def towards(self, others: Sequence[float], now: int) -> Iterator[float]:
        """The mean of each position, weighted with `others`, the estimates of all requests."""
        for j, (mean, other) in enumerate(zip(self.means, others, strict=True)):
            weight = self.weight(j, now)
            yield other + (mean - other) * weight / (weight + PULL)
