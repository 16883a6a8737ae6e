"""Chains: the passes of the MTP layer over a batch, and the drafts that they make."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.speculative.eagle_info import EagleDraftInput
from torch import Tensor

from qwen3next_plugin.engines.sglang.speculation.images import axes_of
from qwen3next_plugin.engines.sglang.speculation.passes import locate, run_layer
from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput
from qwen3next_plugin.mtp.chains import extend
from qwen3next_plugin.mtp.rows import Row


class Chains:
    """The passes of the MTP layer, for SGLang's runner of it."""

    def __init__(self, runner: Any, req_to_token_pool: Any) -> None:
        self.runner, self.req_to_token_pool = runner, req_to_token_pool
        # Number of drafts in the next step, for requests that have their first draft.
        self.lengths: dict[str, int] = {}

    def _forward(self, batch: ScheduleBatch, fed: list[Row]) -> tuple[Tensor, Tensor]:
        """Run the MTP layer over the fed tokens; returns `run_layer`'s results for drafting rows.

        Shapes: returns [drafting, D], and [drafting, D] or [drafting, hc·D], of each one's last
        """
        tokens = [row.fed for row in fed if row.fed is not None]
        counts = [len(part) for part in tokens]
        token_ids = torch.cat([part.token_ids for part in tokens])
        self.runner.model.see(token_ids)
        requests = batch.req_pool_indices[[row.index for row in fed]]
        table = self.req_to_token_pool.req_to_token
        positions, locations = locate(table, requests, [part.first for part in tokens], counts)
        hidden_states, states = run_layer(
            self.runner,
            requests=requests,
            counts=counts,
            positions=positions,
            locations=locations,
            token_ids=token_ids,
            hidden_states=torch.cat([part.hidden_states for part in tokens]),
            axes=[axes_of(batch.reqs[row.index]) for row in fed],
        )
        ends = [end - 1 for end in accumulate(counts)]
        drafting = [end for end, row in zip(ends, fed, strict=True) if row.draft]
        return hidden_states[drafting], states[drafting]

    def draft(self, batch: ScheduleBatch) -> RaggedVerifyInput:
        """Extend the first drafts to chains; without a first draft, only the last token."""
        lengths = [self.lengths.get(request.rid, 0) for request in batch.reqs]
        widths = [1 + length for length in lengths]
        # SGLang's grammars and custom logit processors need the same width for every request.
        if batch.has_grammar or batch.sampling_info.has_custom_logit_processor:
            widths = [max(widths)] * len(widths)
        table = self.req_to_token_pool.req_to_token
        places = locate(table, batch.req_pool_indices, batch.seq_lens.tolist(), widths)
        return RaggedVerifyInput.of(
            self._chains(batch, lengths, [0, *accumulate(widths)], *places),
            widths=widths,
            positions=places[0],
            locations=places[1],
            axes=[axes_of(request) for request in batch.reqs],
        )

    def _chains(
        self,
        batch: ScheduleBatch,
        lengths: Sequence[int],
        starts: Sequence[int],
        positions: Tensor,
        locations: Tensor,
    ) -> list[list[int]]:
        """Each request's last token and its drafts, of which the first is made already.

        Shapes: starts [N + 1] of the T tokens of all chains, positions, locations [T]
        """
        spec_info: EagleDraftInput = batch.spec_info
        chains = [[token] for token in spec_info.bonus_tokens.tolist()]
        drafting = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        index = torch.tensor(drafting, dtype=torch.int64)
        requests = batch.req_pool_indices[index]
        axes = [axes_of(batch.reqs[i]) for i in drafting]

        def run(depth: int, token_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
            n = len(token_ids)
            at = torch.tensor([starts[i] + depth - 1 for i in drafting[:n]])
            hidden_states, states = run_layer(
                self.runner,
                requests=requests[:n],
                counts=[1] * n,
                positions=positions[at],
                locations=locations[at],
                token_ids=token_ids,
                hidden_states=states,
                axes=axes[:n],
            )
            return self.runner.model.get_top_tokens(hidden_states), states

        first, states = spec_info.topk_index[index, 0], spec_info.hidden_states[index]
        made = extend([lengths[i] for i in drafting], first, states, run)
        for i, drafts in zip(drafting, made, strict=True):
            chains[i] += drafts
        return chains

    def _drafts(
        self,
        bonus_tokens: Tensor,
        drafting: list[Row],
        hidden_states: Tensor,
        states: Tensor,
    ) -> EagleDraftInput:
        """What SGLang carries to the next step: the first drafts, or zeros where there is none.

        Shapes: bonus_tokens [N]; hidden_states, states as `_forward` returns them
        """
        N, D = len(bonus_tokens), states.shape[1]
        token_ids = torch.zeros(0, dtype=torch.int64)
        if drafting:
            token_ids = self.runner.model.get_top_tokens(hidden_states)
        if len(drafting) < N:
            index = torch.tensor([row.index for row in drafting], dtype=torch.int64)
            token_ids = token_ids.new_zeros(N).index_copy_(0, index, token_ids)
            states = states.new_zeros(N, D).index_copy_(0, index, states)
        return EagleDraftInput(
            bonus_tokens=bonus_tokens,
            topk_index=token_ids[:, None],
            topk_p=torch.ones(N, 1),
            hidden_states=states,
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
