"""Chains: the passes of the MTP layer over a batch, and the drafts that they make."""

from itertools import accumulate

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.speculative.eagle_info import EagleDraftInput, EagleVerifyInput
from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

from qwen3next_plugin.engines.sglang.speculation.passes import chain, run_layer
from qwen3next_plugin.mtp.pending import Row


class Chains(EagleDraftWorker):
    """SGLang's draft worker with our chains."""

    next_steps: int  # drafts of each request in the next step
    drafting: set[str]  # requests whose first draft is made

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
            images=[batch.reqs[row.index].multimodal_inputs for row in fed],
        )
        ends = [end - 1 for end in accumulate(counts)]
        return hidden_states[[end for end, row in zip(ends, fed, strict=True) if row.draft]]

    def draft(self, batch: ScheduleBatch, *, with_topology: bool = False) -> EagleVerifyInput:
        """Extend the first drafts to chains; requests without one get any tokens."""
        spec_info: EagleDraftInput = batch.spec_info
        drafting = [i for i, request in enumerate(batch.reqs) if request.rid in self.drafting]
        index = torch.tensor(drafting)
        requests, seq_lens = batch.req_pool_indices[index], batch.seq_lens[index].tolist()
        images = [batch.reqs[i].multimodal_inputs for i in drafting]
        hidden_states = spec_info.hidden_states[index]
        drafts = [spec_info.topk_index[index, 0]]  # [drafting] each
        for i in range(self.next_steps - 1):
            hidden_states = run_layer(
                self.draft_runner,
                requests=requests,
                firsts=[length + i for length in seq_lens],
                counts=[1] * len(drafting),
                token_ids=drafts[-1],
                hidden_states=hidden_states,
                images=images,
            )
            drafts.append(self.draft_runner.model.get_top_tokens(hidden_states))
        tokens = torch.zeros(len(batch.reqs), 1 + len(drafts), dtype=torch.int64)
        tokens[:, 0] = spec_info.bonus_tokens
        # index_copy_ and not [index] = …, which starts all threads for a few rows.
        tokens[:, 1:].index_copy_(0, index, torch.stack(drafts, dim=1))
        return chain(tokens, batch.seq_lens)

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
