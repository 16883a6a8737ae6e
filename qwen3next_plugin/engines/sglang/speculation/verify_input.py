"""What a verification of chains reads: each request's last token and its own number of drafts.

SGLang's own input has the same number of drafts for every request. Here the tokens of all requests
lie end to end, so that a request without drafts costs one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self

import torch
from sglang.srt.speculative.eagle_info import EagleVerifyInput

from qwen3next_plugin.mtp.images import Axes, mrope_positions

FILLER = 0  # a token


@dataclass
class RaggedVerifyInput(EagleVerifyInput):
    """Chains to verify: T tokens in all, n of the longest chain.

    Shapes:
        draft_token [T]
        query_start_loc [N + 1], where each chain starts among the T
        retrieve_index, retrieve_next_token [N, n]: where a chain's tokens are among the T, and
            which of its n follows each; -1: none
    """

    widths: list[int] = field(default_factory=list)  # tokens of each chain, filler included
    query_start_loc: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(
        cls,
        chains: Sequence[list[int]],
        *,
        widths: Sequence[int],
        positions: torch.Tensor,
        locations: torch.Tensor,
        axes: Sequence[Axes | None],
    ) -> Self:
        """Chains of N requests, filled up to `widths`.

        Filler follows no token of its chain, so it is never accepted.

        Shapes: positions, locations [T] of all tokens, filler included; axes [N]
        """
        N, n = len(chains), max(widths)
        starts = [0, *accumulate(widths)]
        parts = list(zip(starts, chains, widths, strict=False))
        in_images = mrope_positions(axes, positions, widths)
        return cls(
            draft_token=torch.tensor(
                [
                    token
                    for _, chain, width in parts
                    for token in chain + [FILLER] * (width - len(chain))
                ]
            ),
            custom_mask=torch.empty(0, dtype=torch.bool),  # a chain is causal
            positions=positions,
            retrieve_index=torch.tensor(
                [[start + j if j < width else -1 for j in range(n)] for start, _, width in parts]
            ),
            retrieve_next_token=torch.tensor(
                [[j + 1 if j + 1 < len(chain) else -1 for j in range(n)] for chain in chains]
            ),
            retrieve_next_sibling=torch.full((N, n), -1),
            retrieve_cum_len=None,
            spec_steps=n - 1,
            topk=1,
            draft_token_num=n,
            capture_hidden_mode=None,
            seq_lens_sum=None,
            seq_lens_cpu=None,
            prepared_out_cache_loc=locations,
            prepared_mrope_positions=positions.expand(3, -1) if in_images is None else in_images,
            widths=list(widths),
            query_start_loc=torch.tensor(starts),
        )

    def widen(self, result: Any, *, hidden_states: bool) -> None:
        """Give SGLang's scheduler rows of n tokens, of which it reads the accepted ones.

        result: of the verification, changed in place; `hidden_states`: widen these, too
        """
        if min(self.widths) == self.draft_token_num:
            return
        index = self.retrieve_index.clamp(min=0).flatten()
        result.next_token_ids = result.next_token_ids[index]
        if hidden_states:
            output = result.logits_output
            output.hidden_states = output.hidden_states[index]
