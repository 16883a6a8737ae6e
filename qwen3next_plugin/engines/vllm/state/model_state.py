"""Where a request's page goes when it crosses a block boundary, for vLLM's model runner V2.

vLLM's prefix caching ("align" mode) keeps the state of a prefix in the block that ends with it. Its
own class shifts what it copies by the number of accepted draft tokens, and looks for it in the
k + 1 blocks of its speculative states. Ours are one page, which says itself where it stands, and a
verbatim copy of it is always a correct copy. So:

- the accepted counts stay at 1, the value by which the host's copy before a step shifts nothing;
- after a step, a row whose tokens filled a block leaves a copy of its page there.

Both copies are the host's own kernel, whose programs end at once where there is nothing to copy;
nothing waits for the device. Runner V2 asks the model for this class; nothing else imports it.
"""

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState


class Qwen3NextModelState(MambaHybridModelState):
    """The host's state of a hybrid model, with one self-describing page per request.

    `_mamba_state_idx_gpu` [max_num_reqs] is the host's: the column of each request's page in its
    block table, moved on by `preprocess_state` before each step.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        model: nn.Module,
        encoder_cache: EncoderCache | None,
        device: torch.device,
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        # One entry more than requests: there the rows land that the host masks with -1.
        columns = torch.full((2, self.max_num_reqs + 1), -1, dtype=torch.int32, device=device)
        self._from_column, self._to_column = columns
        self._no_shift = torch.zeros(self.max_num_reqs, dtype=torch.int32, device=device)

    def postprocess_state(
        self,
        idx_mapping: torch.Tensor,
        num_sampled: torch.Tensor | int,
        num_computed_tokens: torch.Tensor | None = None,
    ) -> None:
        """Leave a copy of the page in the block that a row filled; the host's counts stay at 1.

        In the middle of a verified draft too: the page's window reaches from before the boundary
        to behind it. A prefill chunk has its page there already, as the host ends it there.

        Shapes: idx_mapping [N], each row's request or -1, num_sampled [N], committed by this step,
        num_computed_tokens [max_num_reqs], after this step
        """
        pages = self._mamba_ctx if self._align_mode else None
        if pages is None or num_computed_tokens is None or not len(idx_mapping):
            return
        reached = num_computed_tokens[idx_mapping]
        full_blocks = reached // pages.block_size
        filled_one = full_blocks > (reached - num_sampled) // pages.block_size
        column = self._mamba_state_idx_gpu[idx_mapping]
        self._from_column[idx_mapping] = torch.where(filled_one, column, -1)  # -1: no copy
        self._to_column[idx_mapping] = full_blocks - 1
        pages.run_fused_precopy(
            len(idx_mapping), self._to_column, self._from_column, self._no_shift, idx_mapping
        )
