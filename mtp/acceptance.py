"""Acceptance: how likely each draft position is accepted, learned from verifications.

p_j is the chance that draft j is accepted, given that drafts 1 to j-1 were. Acceptance changes with
the text, so old observations count less.
"""

from collections.abc import Sequence

PRIOR, PRIOR_WEIGHT = 0.8, 5.0  # acceptance before anything was observed, as so many observations
KEEP, KEEP_ALL = 0.95, 0.998  # weight that observations keep at the next: of one request, of all
FADE = 0.98  # weight that a request's observations keep in a step without drafts
PULL = 16.0  # most weight, in observations, of all requests in the estimate of one


class Acceptance:
    """How often draft 1, 2, … was observed and accepted, old observations counting less."""

    def __init__(self, max_draft: int, keep: float = KEEP) -> None:
        self.keep = keep
        self.seen, self.accepted = [0.0] * max_draft, [0.0] * max_draft
        self.tokens, self.idle = 0, 0  # produced in all; steps since the last draft
        self.right: bool | None = None  # whether the last first draft was

    def observe(self, drafted: int, accepted: int) -> None:
        """Count the first `accepted` of `drafted` as accepted and the next one as rejected."""
        self.tokens += 1 + accepted
        if not drafted:
            self.idle += 1
            return
        keep, self.idle, self.right = self.keep * FADE**self.idle, 0, accepted > 0
        for j in range(min(drafted, accepted + 1)):
            self.seen[j] = keep * self.seen[j] + 1
            self.accepted[j] = keep * self.accepted[j] + (j < accepted)

    def along(self) -> list[float]:
        """p_1, p_2, …, each as if a few more observations had shown the one before."""
        before, estimates = PRIOR, []
        for accepted, seen in zip(self.accepted, self.seen, strict=True):
            before = (accepted + PRIOR_WEIGHT * before) / (seen + PRIOR_WEIGHT)
            estimates.append(before)
        return estimates

    def chances(self, others: Sequence[float], pull: float) -> list[float]:
        """p_1, p_1 p_2, …, as if `pull` more observations had shown the p_j of `others`."""
        fade, chance, chances = FADE**self.idle, 1.0, []
        for accepted, seen, p in zip(self.accepted, self.seen, others, strict=True):
            chance *= (fade * accepted + pull * p) / (fade * seen + pull)
            chances.append(chance)
        return chances


class Likeness:
    """How alike requests are, from the first drafts of consecutive steps of a request.

    Where requests are alike, one draft says nothing about the next, and two of them differ with
    chance 2 p (1 - p). Where requests are apart, fewer do: the correlation is what is missing.
    """

    def __init__(self) -> None:
        self.right, self.differ = PRIOR, 2 * PRIOR * (1 - PRIOR)

    def observe(self, before: bool, right: bool) -> None:
        self.right += (right - self.right) * (1 - KEEP_ALL)
        self.differ += ((right != before) - self.differ) * (1 - KEEP_ALL)

    @property
    def pull(self) -> float:
        """Weight of all requests in the estimate of one: that of a beta prior, at least 1."""
        correlation = 1 - self.differ / (2 * self.right * (1 - self.right) + 1e-9)
        return max(1.0, 1 / max(correlation, 1 / (1 + PULL)) - 1)
