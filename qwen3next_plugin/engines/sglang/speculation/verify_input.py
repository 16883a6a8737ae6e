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

from qwen3next_plugin.engines.sglang.speculation.passes import locate
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
        table: torch.Tensor,
        requests: torch.Tensor,
        firsts: Sequence[int],
        axes: Sequence[Axes | None],
        same_width: bool,
    ) -> Self:
        """The chains of `requests` in SGLang's table of KV slots, each from a position on.

        `same_width`: fill up each chain to the longest, for what in SGLang counts tokens by one
        width; filler follows no token of its chain, so it is never accepted.
        """
        N, n = len(chains), max(map(len, chains))
        widths = [n] * N if same_width else [len(chain) for chain in chains]
        filled = [
            chain + [FILLER] * (width - len(chain))
            for chain, width in zip(chains, widths, strict=True)
        ]
        starts = [0, *accumulate(widths)]
        positions, slots = locate(table, requests, firsts, widths)
        in_images = mrope_positions(axes, positions, widths)
        parts = zip(starts, widths, strict=False)
        index = [[start + j if j < width else -1 for j in range(n)] for start, width in parts]
        child = [[j + 1 if j + 1 < len(chain) else -1 for j in range(n)] for chain in chains]
        return cls(
            draft_token=torch.tensor([token for chain in filled for token in chain]),
            custom_mask=torch.empty(0, dtype=torch.bool),  # a chain is causal
            positions=positions,
            retrieve_index=torch.tensor(index),
            retrieve_next_token=torch.tensor(child),
            retrieve_next_sibling=torch.full((N, n), -1),
            retrieve_cum_len=None,
            spec_steps=n - 1,
            topk=1,
            draft_token_num=n,
            capture_hidden_mode=None,
            seq_lens_sum=None,
            seq_lens_cpu=None,
            prepared_out_cache_loc=slots,
            prepared_mrope_positions=positions.expand(3, -1) if in_images is None else in_images,
            widths=widths,
            query_start_loc=torch.tensor(starts),
        )

    def widen(self, result: Any, *, hidden_states: bool) -> None:
        """Give SGLang's scheduler rows of n tokens, of which it reads the accepted ones.

        result: of the verification, changed in place; `hidden_states`: these too
        """
        index = self.retrieve_index.clamp(min=0).flatten()
        result.next_token_ids = result.next_token_ids[index]
        if hidden_states:
            output = result.logits_output
            output.hidden_states = output.hidden_states[index]
