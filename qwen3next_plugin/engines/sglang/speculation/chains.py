"""Chains: the passes of the MTP layer over a batch, and the drafts that they make."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.speculative.eagle_info import EagleDraftInput
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.engines.sglang.speculation.images import axes_of
from qwen3next_plugin.engines.sglang.speculation.passes import run_layer
from qwen3next_plugin.engines.sglang.speculation.verify_input import RaggedVerifyInput
from qwen3next_plugin.mtp.pending import Row


class Chains(EagleDraftWorker):
    """SGLang's draft worker with our chains."""

    lengths: dict[str, int]  # drafts in the next step, of requests whose first draft is made

    def _forward(self, batch: ScheduleBatch, fed: list[Row]) -> torch.Tensor:
        """Run the MTP layer over what it reads; the last of each row that drafts [drafting, D]."""
        tokens = [row.fed for row in fed if row.fed is not None]
        counts = [len(part) for part in tokens]
        token_ids = torch.cat([part.token_ids for part in tokens])
        self.draft_runner.model.see(token_ids)
        hidden_states = run_layer(
            self.draft_runner,
            requests=batch.req_pool_indices[[row.index for row in fed]],
            firsts=[part.first for part in tokens],
            counts=counts,
            token_ids=token_ids,
            hidden_states=torch.cat([part.hidden_states for part in tokens]),
            axes=[axes_of(batch.reqs[row.index]) for row in fed],
        )
        ends = [end - 1 for end in accumulate(counts)]
        return hidden_states[[end for end, row in zip(ends, fed, strict=True) if row.draft]]

    def draft(self, batch: ScheduleBatch, *, with_topology: bool = False) -> RaggedVerifyInput:
        """Extend the first drafts to chains; a request without one has its last token alone."""
        chains = [[token] for token in batch.spec_info.bonus_tokens.tolist()]
        firsts = batch.seq_lens.tolist()
        self._extend(batch, chains, firsts)
        return RaggedVerifyInput.of(
            chains,
            table=self.req_to_token_pool.req_to_token,
            requests=batch.req_pool_indices,
            firsts=firsts,
            axes=[axes_of(request) for request in batch.reqs],
            # SGLang's grammars and custom logit processors count tokens so.
            same_width=batch.has_grammar or batch.sampling_info.has_custom_logit_processor,
        )

    def _extend(
        self, batch: ScheduleBatch, chains: Sequence[list[int]], firsts: Sequence[int]
    ) -> None:
        """Append to each chain as many drafts as its request makes."""
        spec_info: EagleDraftInput = batch.spec_info
        lengths = [self.lengths.get(request.rid, 0) for request in batch.reqs]
        drafting = [i for i, length in enumerate(lengths) if length]
        hidden_states = spec_info.hidden_states[torch.tensor(drafting, dtype=torch.int64)]
        for i in drafting:
            chains[i].append(int(spec_info.topk_index[i]))
        for depth in range(1, max(lengths)):
            going_on = [at for at, i in enumerate(drafting) if lengths[i] > depth]
            if len(going_on) < len(drafting):
                drafting = [drafting[at] for at in going_on]
                hidden_states = hidden_states[torch.tensor(going_on)]
            hidden_states = run_layer(
                self.draft_runner,
                requests=batch.req_pool_indices[torch.tensor(drafting)],
                firsts=[firsts[i] + depth - 1 for i in drafting],
                counts=[1] * len(drafting),
                token_ids=torch.tensor([chains[i][-1] for i in drafting]),
                hidden_states=hidden_states,
                axes=[axes_of(batch.reqs[i]) for i in drafting],
            )
            tokens = self.draft_runner.model.get_top_tokens(hidden_states)
            for i, token in zip(drafting, tokens.tolist(), strict=True):
                chains[i].append(token)

    def _drafts(
        self, bonus_tokens: torch.Tensor, drafting: list[Row], hidden_states: torch.Tensor
    ) -> EagleDraftInput:
        """What SGLang carries to the next step: the first drafts, or zeros where there is none.

        Shapes: bonus_tokens [N], hidden_states [drafting, D] after each one's last token
        """
        N, D = len(bonus_tokens), hidden_states.shape[1]
        draft = EagleDraftInput(
            bonus_tokens=bonus_tokens,
            topk_index=torch.zeros(N, 1, dtype=torch.int64),
            topk_p=torch.ones(N, 1),
            hidden_states=hidden_states.new_zeros(N, D),
            num_tokens_per_req=1,
            num_tokens_for_logprob_per_req=1,
        )
        if drafting:
            index = torch.tensor([row.index for row in drafting])
            tokens = self.draft_runner.model.get_top_tokens(hidden_states)
            draft.topk_index.index_copy_(0, index, tokens[:, None])
            draft.hidden_states.index_copy_(0, index, hidden_states)
        return draft
