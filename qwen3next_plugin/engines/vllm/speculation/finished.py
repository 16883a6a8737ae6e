"""vLLM's tensors of the step that has just ended, as rows of the MTP layer."""

from typing import Any

import numpy as np
import torch

from qwen3next_plugin.mtp.loop import Loop
from qwen3next_plugin.mtp.rows import FinishedStep


def finished(
    runner: Any,
    loop: Loop,
    *,
    query_start_loc: torch.Tensor,
    sampled_after: torch.Tensor | None,
    token_ids: torch.Tensor,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    next_token_ids: torch.Tensor,
) -> FinishedStep:
    """The step of N rows and T tokens, rejected drafts included.

    Shapes:
        query_start_loc [N + 1], token_ids, positions [T], hidden_states [T, D]; next_token_ids [N],
        the last sampled tokens; sampled_after [N], the indices of the tokens that they were
        sampled after (None: the last token of each row)
    """
    bounds = query_start_loc.numpy()
    ends = bounds[1:] if sampled_after is None else sampled_after.numpy() + 1
    firsts = positions.numpy()[bounds[:-1]].tolist()
    requests = list(runner.input_batch.req_ids)
    states = [runner.requests[request] for request in requests]
    prefilling = runner.discard_request_mask.np[: len(firsts)].tolist()
    after = np.empty_like(token_ids.numpy())  # the token after each [T]
    after[:-1] = token_ids.numpy()[1:]
    after[ends - 1] = next_token_ids.numpy()
    counts = (ends - bounds[:-1]).tolist()
    for i in (i for i, more in enumerate(prefilling) if more):
        # vLLM gives the prompt's last token, not the one after the chunk
        after[ends[i] - 1] = _token_at(states[i], firsts[i] + counts[i])
    after[after >= runner.input_batch.vocab_size] = 0  # in place of embeddings: any token
    return FinishedStep(
        requests=requests,
        starts=bounds[:-1].tolist(),
        firsts=firsts,
        scheduled=np.diff(bounds).tolist(),
        counts=counts,
        prefilling=prefilling,
        continues=[  # streaming input extends a prompt at its answer's end
            loop.ends.get(request) == first >= state.num_prompt_tokens
            for request, first, state in zip(requests, firsts, states, strict=True)
        ],
        token_ids=torch.from_numpy(after),
        hidden_states=hidden_states,
    )


def _token_at(state: Any, position: int) -> int:
    """A token of a request's prompt; 0 if its prompt is given as embeddings."""
    return 0 if state.prompt_token_ids is None else state.get_token_id(position)
