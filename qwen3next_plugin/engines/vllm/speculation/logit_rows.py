"""LogitRows: the request and the number of drafts that belong to each row of logits."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


@dataclass(frozen=True)
class LogitRows:
    """T rows of logits of N requests, in the requests' order.

    A request with n drafts has n + 1 rows: its row j has the logits for the token after its first
    j drafts.
    """

    drafts: list[list[int]]  # token ids of each request
    device: torch.device

    @classmethod
    def from_metadata(cls, metadata: SpecDecodeMetadata) -> "LogitRows":
        token_ids = metadata.draft_token_ids.tolist()
        ends = accumulate(metadata.num_draft_tokens)
        drafts = [token_ids[begin:end] for begin, end in pairwise([0, *ends])]
        return cls(drafts, metadata.draft_token_ids.device)

    @cached_property
    def counts(self) -> list[int]:
        """The number of rows of each request."""
        return [len(drafts) + 1 for drafts in self.drafts]

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each request."""
        return [0, *accumulate(self.counts[:-1])]

    @cached_property
    def request(self) -> torch.Tensor:
        """The request of each row: [T]."""
        return torch.tensor([i for i, _ in self.positions], device=self.device)

    @cached_property
    def positions(self) -> list[tuple[int, int]]:
        """(request, number of drafts before it) of each row."""
        return [(i, j) for i, count in enumerate(self.counts) for j in range(count)]

    def padded(self) -> torch.Tensor:
        """The rows of each request [N, K+1]; a shorter request repeats its last row."""
        last = torch.tensor(self.counts) - 1
        column = torch.arange(max(self.counts))
        rows = torch.tensor(self.starts)[:, None] + column.minimum(last[:, None])
        return rows.to(self.device)

    def accept(self, sampled: list[int]) -> list[list[int]]:
        """Each request's sampled tokens, up to and including the first that is not its draft."""
        accepted = []
        for start, drafts in zip(self.starts, self.drafts, strict=True):
            wrong = (j for j, draft in enumerate(drafts) if sampled[start + j] != draft)
            accepted.append(sampled[start : start + next(wrong, len(drafts)) + 1])
        return accepted
